//! `hybridmig keys`: this host's identity.

use std::process::ExitCode;

use hybridmig_transport::identity::Identity;

use super::identity_path;
use crate::cli::{KeysArgs, KeysCommand};

/// Makes or shows the identity.
pub fn run(args: KeysArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        KeysCommand::New { identity } => {
            let path = identity_path(identity.as_deref())?;
            let identity = Identity::create(&path)?;
            eprintln!("made {}", path.display());
            println!("{}", identity.fingerprint());
        }
        KeysCommand::Show { identity } => {
            let path = identity_path(identity.as_deref())?;
            println!("{}", Identity::load(&path)?.fingerprint());
        }
    }
    Ok(ExitCode::SUCCESS)
}
