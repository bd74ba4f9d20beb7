//! Who this side is: a key and its certificate in one PEM file, and the fingerprint by which the
//! other side knows it. Keys never leave this file's types except into TLS.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};

/// Largest key or certificate file that is read, in bytes.
pub(crate) const MAX_FILE: u64 = 1 << 20;

/// SHA-256 of a certificate in DER form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(Sha256::digest(certificate.as_ref()).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Not a fingerprint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a fingerprint: sha256: and 64 hexadecimal digits are expected")]
pub struct FingerprintError(String);

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    /// Tolerates a missing `sha256:`, colons between the digits, and either case.
    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        let bad = || FingerprintError(text.chars().take(100).collect());
        let trimmed = text.trim();
        let digits = match trimmed.get(..7) {
            Some(prefix) if prefix.eq_ignore_ascii_case("sha256:") => &trimmed[7..],
            _ => trimmed,
        };
        let mut bytes = [0; 32];
        let mut count = 0;
        for character in digits.chars().filter(|c| *c != ':') {
            let digit = character.to_digit(16).ok_or_else(bad)? as u8;
            let byte = bytes.get_mut(count / 2).ok_or_else(bad)?;
            *byte = (*byte << 4) | digit;
            count += 1;
        }
        if count == 64 {
            Ok(Self(bytes))
        } else {
            Err(bad())
        }
    }
}

/// What is wrong with an identity or with a file that names peers.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file exists; a key is never overwritten.
    #[error("{} exists already: remove it yourself if no peer needs it any more", .0.display())]
    Exists(PathBuf),
    /// The operating system said no.
    #[error("{what} {}", .path.display())]
    Io {
        /// What was attempted, for example `reading`.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Others could have read the key.
    #[error(
        "{} holds a private key but is readable by others (mode {mode:04o}): chmod 600 it, \
         and make a new key if someone may have read it",
        .path.display()
    )]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file has not what it should have.
    #[error("{}: {what}", .path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong, and in which line where that is known.
        what: String,
    },
    /// A key or certificate could not be made.
    #[error("making an identity: {0}")]
    Generate(String),
}

/// A key with its certificate chain.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint())
    }
}

impl Identity {
    /// Makes a new key with a self-signed certificate, in memory only.
    pub fn generate() -> Result<Self, IdentityError> {
        Ok(Self::generate_with_pem()?.0)
    }

    /// A new identity and the text of its file.
    fn generate_with_pem() -> Result<(Self, String), IdentityError> {
        let error = |error: rcgen::Error| IdentityError::Generate(error.to_string());
        let key = rcgen::KeyPair::generate().map_err(error)?;
        let mut params =
            rcgen::CertificateParams::new(vec!["hybridmig".to_owned()]).map_err(error)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "hybridmig");
        let certificate = params.self_signed(&key).map_err(error)?;
        let identity = Self {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        };
        Ok((identity, key.serialize_pem() + &certificate.pem()))
    }

    /// Makes a new identity and keeps it in `path`, readable by its owner only. Refuses to
    /// overwrite; a missing parent directory is made with mode 0700.
    pub fn create(path: &Path) -> Result<Self, IdentityError> {
        let io = |what| move |source| io_error(what, path, source);
        if let Some(parent) = path.parent()
            && !parent.as_os_str().is_empty()
        {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(io("making the directory of"))?;
        }
        let (identity, pem) = Self::generate_with_pem()?;
        let opened = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let mut file = match opened {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(IdentityError::Exists(path.into()));
            }
            other => other.map_err(io("making"))?,
        };
        let written = file
            .write_all(pem.as_bytes())
            .and_then(|()| file.sync_all());
        if let Err(error) = written {
            // Half a key is of no use and would stand in the way of the next attempt.
            if let Err(removal) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %removal, "could not remove an unfinished key");
            }
            return Err(io("writing")(error));
        }
        Ok(identity)
    }

    /// Reads an identity: one PEM file with a private key and a certificate, or a chain whose
    /// first certificate is the key's.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let contents = |what: String| IdentityError::Contents {
            path: path.into(),
            what,
        };
        let metadata = fs::metadata(path).map_err(|e| io_error("reading", path, e))?;
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Readable {
                path: path.into(),
                mode,
            });
        }
        let pem = read_bounded(path)?;
        let key = PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|error| contents(format!("no usable private key in it ({error:?})")))?;
        let chain = certificates(path, &pem)?;
        let identity = Self { chain, key };
        identity.check_key().map_err(contents)?;
        Ok(identity)
    }

    /// The fingerprint that the other side pins.
    pub fn fingerprint(&self) -> Fingerprint {
        // Every constructor puts at least one certificate in.
        Fingerprint::of(&self.chain[0])
    }

    /// Whether the key belongs to the first certificate.
    fn check_key(&self) -> Result<(), String> {
        let key = rustls::crypto::ring::sign::any_supported_type(&self.key)
            .map_err(|error| format!("the private key cannot be used: {error}"))?;
        let certified = rustls::sign::CertifiedKey::new(self.chain.clone(), key);
        certified
            .keys_match()
            .map_err(|error| format!("key and first certificate do not belong together: {error}"))
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.chain.clone()
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }

    /// A secret of this identity for one purpose and one UDP port, the same in every process.
    pub(crate) fn derive(&self, purpose: &str, port: u16) -> [u8; 32] {
        let mut secret = blake3::Hasher::new_derive_key(purpose);
        secret.update(&port.to_le_bytes());
        secret.update(self.key.secret_der());
        *secret.finalize().as_bytes()
    }
}

/// Reads every certificate of a PEM file; at least one is there.
pub(crate) fn certificates(
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| IdentityError::Contents {
            path: path.into(),
            what: format!("a certificate in it is malformed ({error:?})"),
        })?;
    if chain.is_empty() {
        return Err(IdentityError::Contents {
            path: path.into(),
            what: "no certificate in it".to_owned(),
        });
    }
    Ok(chain)
}

/// Reads a file of at most [`MAX_FILE`] bytes.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>, IdentityError> {
    use io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|source| io_error("reading", path, source))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(IdentityError::Contents {
            path: path.into(),
            what: format!("larger than {MAX_FILE} bytes; this is not the right file"),
        });
    }
    Ok(bytes)
}

pub(crate) fn io_error(what: &'static str, path: &Path, source: io::Error) -> IdentityError {
    IdentityError::Io {
        what,
        path: path.into(),
        source,
    }
}
