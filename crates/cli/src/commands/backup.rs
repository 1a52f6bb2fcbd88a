//! `pgherd backup`: repositories.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use pgherd_agent::repository::{self, RepositoryError};

use crate::failure::Failure;
use crate::output::note;

/// Make a repository for WAL and base backups
///
/// Base backups are not built yet; a repository takes WAL, see `pgherd wal`.
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make an empty repository where there is none
    ///
    /// The file says where: repository = "file:///directory", which must be there, or "s3://bucket/folder" with region, endpoint,
    /// allow_http, access_key_file and secret_key_file. passphrase_file or key_file encrypts it; without them nothing of it can be
    /// read again. Whether the store keeps its promises is tried out first.
    Init {
        /// File that says where the repository is and what opens it
        #[arg(long, value_name = "FILE")]
        repository: PathBuf,
    },
}

pub(crate) async fn run(args: BackupArgs) -> Result<(), Failure> {
    let Action::Init { repository } = args.action;
    let made = repository::create(&repository).await.map_err(failed)?;
    let encrypted = if made.encrypted { ", encrypted" } else { "" };
    note(&format!("made a repository in {}{encrypted}", made.place));
    Ok(())
}

pub(crate) fn failed(error: RepositoryError) -> Failure {
    let hint = error.hint();
    let failure = match error {
        RepositoryError::File(findings) => return findings.into(),
        RepositoryError::Read { path, source } => Failure::io("read", &path, &source),
        error => crate::failure::with_sources(&error),
    };
    hint.into_iter().fold(failure, Failure::hint)
}
