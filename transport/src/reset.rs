//! What lets an endpoint tell the peers of one that was killed that their links are gone, instead of having them wait
//! for an answer: stateless resets (RFC 9000, section 10.3). The token that ends a connection is made of the
//! connection's id and a key, and only ids that the endpoint could have given are answered; so both have to be the same
//! in the process that follows on the same port. They come from the identity's private key and the port: with the
//! port, since an endpoint that shared the key of another one would answer for that one's links as well (section
//! 21.11).

use std::sync::Arc;

use quinn_proto::HashedConnectionIdGenerator;
use quinn_proto::crypto::{CryptoError, HmacKey};

use crate::identity::Identity;

/// What blake3 derives keys for; changing these only costs what this file is for, once.
const TOKENS: &str = "hybridmig 2026-11 stateless reset tokens";
const IDS: &str = "hybridmig 2026-11 connection ids";

struct ResetKey([u8; blake3::KEY_LEN]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let signature = blake3::Hash::from_slice(signature).map_err(|_| CryptoError)?;
        // Compared in constant time.
        if blake3::keyed_hash(&self.0, data) == signature {
            Ok(())
        } else {
            Err(CryptoError)
        }
    }
}

/// How the endpoint with this identity on this port deals with packets of connections that it does not know.
pub(crate) fn endpoint_config(identity: &Identity, port: u16) -> quinn::EndpointConfig {
    let tokens = identity.derive(TOKENS, port);
    let ids = identity.derive(IDS, port);
    let ids = u64::from_le_bytes(ids[..8].try_into().expect("eight bytes"));
    let mut config = quinn::EndpointConfig::new(Arc::new(ResetKey(tokens)));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_one_identity_port_and_connection() {
        let (one, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let key = |identity: &Identity, port| ResetKey(identity.derive(TOKENS, port));
        let sign = |key: &ResetKey, data: &[u8]| {
            let mut signature = vec![0; key.signature_len()];
            key.sign(data, &mut signature);
            signature
        };
        let token = sign(&key(&one, 1), b"id");
        assert!(key(&one, 1).verify(b"id", &token).is_ok());
        for (key, id) in [
            (key(&other, 1), b"id"),
            (key(&one, 2), b"id"),
            (key(&one, 1), b"no"),
        ] {
            assert!(key.verify(id, &token).is_err());
            assert_ne!(sign(&key, id), token);
        }
        assert!(key(&one, 1).verify(b"id", &token[..31]).is_err());
        assert_ne!(one.derive(TOKENS, 1), one.derive(IDS, 1));
    }
}
