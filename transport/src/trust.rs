//! Whom this side talks to: pinned fingerprints, a file of known peers, certificate authorities.
//! Trust that is empty refuses everybody, and nothing can switch the judgement off.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::identity::{Fingerprint, IdentityError, certificates, read_bounded};

/// A peer that was judged trustworthy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Of the certificate it presented.
    pub fingerprint: Fingerprint,
    /// Its name in the file of known peers, if it has one.
    pub name: Option<String>,
    /// Whether a certificate authority vouched for it (rather than a pinned fingerprint).
    pub by_authority: bool,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} ({})", self.fingerprint),
            None => write!(f, "{}", self.fingerprint),
        }
    }
}

/// Why a peer was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// It presented no certificate.
    #[error("no certificate was presented")]
    NoCertificate,
    /// Neither pinned nor signed by a trusted authority.
    #[error("certificate {fingerprint} is not trusted here{detail}")]
    Untrusted {
        /// Of the certificate it presented.
        fingerprint: Fingerprint,
        /// What else is known, beginning with a separator; may be empty.
        detail: String,
    },
}

impl Rejection {
    /// The fingerprint that was presented, if any.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        match self {
            Self::NoCertificate => None,
            Self::Untrusted { fingerprint, .. } => Some(*fingerprint),
        }
    }

    /// The reason as the refused side is told it.
    pub(crate) fn for_peer(&self) -> String {
        match self {
            Self::NoCertificate => "you presented no certificate".to_owned(),
            Self::Untrusted { fingerprint, .. } => format!(
                "your certificate {fingerprint} is not trusted here; \
                 add it on this side with --peer {fingerprint}"
            ),
        }
    }
}

/// Whom to trust.
///
/// A certificate authority vouches for *membership*: any certificate it signed is accepted, whatever
/// name is in it. Peers are reached by address, and an address says nothing about who may move
/// guests; use an authority of your own that signs migration hosts only, or pin fingerprints.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    peers: BTreeMap<Fingerprint, Option<String>>,
    authorities: Vec<TrustAnchor<'static>>,
}

impl Trust {
    /// Trusts nobody.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the holder of one certificate.
    #[must_use]
    pub fn with_peer(mut self, fingerprint: Fingerprint) -> Self {
        self.peers.entry(fingerprint).or_insert(None);
        self
    }

    /// Trusts every peer of a file with lines of the form `fingerprint [name] # comment`.
    pub fn add_known_peers(&mut self, path: &Path) -> Result<(), IdentityError> {
        let bytes = read_bounded(path)?;
        let contents = |what: String| IdentityError::Contents {
            path: path.into(),
            what,
        };
        let text = String::from_utf8(bytes)
            .map_err(|_| contents("not a text file; lines of fingerprints are expected".into()))?;
        self.add_known_peers_text(&text).map_err(contents)
    }

    /// Like [`Self::add_known_peers`], from the file's text. The error names the line.
    pub fn add_known_peers_text(&mut self, text: &str) -> Result<(), String> {
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let (fingerprint, name) = line
                .split_once(char::is_whitespace)
                .map_or((line, ""), |(fingerprint, name)| (fingerprint, name.trim()));
            let fingerprint: Fingerprint = fingerprint
                .parse()
                .map_err(|error| format!("line {}: {error}", index + 1))?;
            let known = self.peers.entry(fingerprint).or_insert(None);
            if !name.is_empty() {
                *known = Some(name.to_owned());
            }
        }
        Ok(())
    }

    /// Trusts every peer whose certificate one of the authorities in this PEM file has signed.
    pub fn add_authorities(&mut self, path: &Path) -> Result<(), IdentityError> {
        let pem = read_bounded(path)?;
        for certificate in certificates(path, &pem)? {
            let anchor = anchor_from_trusted_cert(&certificate)
                .map_err(|error| IdentityError::Contents {
                    path: path.into(),
                    what: format!("a certificate in it cannot be an authority: {error}"),
                })?
                .to_owned();
            self.authorities.push(anchor);
        }
        Ok(())
    }

    /// Whether nobody is trusted.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty() && self.authorities.is_empty()
    }

    /// Judges a chain as presented in a handshake, whose signature has proved that the peer holds
    /// the key of its first certificate.
    pub fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, Rejection> {
        let certificate = chain.first().ok_or(Rejection::NoCertificate)?;
        let fingerprint = Fingerprint::of(certificate);
        if let Some(name) = self.peers.get(&fingerprint) {
            return Ok(PeerIdentity {
                fingerprint,
                name: name.clone(),
                by_authority: false,
            });
        }
        let detail = match self.check_authorities(certificate, &chain[1..]) {
            Ok(()) => {
                return Ok(PeerIdentity {
                    fingerprint,
                    name: None,
                    by_authority: true,
                });
            }
            Err(_) if self.is_empty() => "; no peer is: name one with --peer or --ca".to_owned(),
            Err(_) if self.authorities.is_empty() => String::new(),
            Err(error) => format!(", nor signed by a trusted authority ({error})"),
        };
        Err(Rejection::Untrusted {
            fingerprint,
            detail,
        })
    }

    fn check_authorities(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), webpki::Error> {
        if self.authorities.is_empty() {
            return Err(webpki::Error::UnknownIssuer);
        }
        let end_entity = EndEntityCert::try_from(certificate)?;
        let algorithms = rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .all;
        let verify = |usage: KeyUsage| {
            end_entity
                .verify_for_usage(
                    algorithms,
                    &self.authorities,
                    intermediates,
                    UnixTime::now(),
                    usage,
                    None,
                    None,
                )
                .map(|_| ())
        };
        // The same host is the client of one migration and the server of the next: either usage
        // will do.
        verify(KeyUsage::server_auth()).or_else(|_| verify(KeyUsage::client_auth()))
    }
}
