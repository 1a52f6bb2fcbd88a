//! `pgherd backup`: repositories, and base backups in them.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use pgherd_agent::backups::catalog::CatalogError;
use pgherd_agent::backups::verify::Depth;
use pgherd_agent::repository::{self, RepositoryError};

use crate::args::Global;
use crate::failure::Failure;
use crate::output::note;
use catalog::Of;

mod catalog;
mod check;
mod create;
mod drill;
mod herd;
mod keeping;
mod rekey;

/// In which limits of bytes a second are given.
pub(super) const MIB: NonZeroU64 = NonZeroU64::new(1 << 20).expect("it is not zero");

/// Take base backups, and look after the repository that they are in
///
/// Of the herd on this host, or with --repository of any PostgreSQL, whose WAL then has to come into it by `pgherd wal`. `pgherd restore`
/// brings it all back.
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make an empty repository where there is none
    ///
    /// The file says where: repository = "file:///directory", which must be there, "s3://bucket/folder" with region, endpoint,
    /// allow_http, access_key_file and secret_key_file, "gs://bucket/folder" with service_account_file, or
    /// "azure://container/folder" with account and account_key_file or sas_token_file. passphrase_file or key_file encrypts it; without them nothing of it can be
    /// read again. Whether the store keeps its promises is tried out first.
    Init {
        /// File that says where the repository is and what opens it
        #[arg(long, value_name = "FILE")]
        repository: PathBuf,
    },
    Rekey(rekey::RekeyArgs),
    Create(create::CreateArgs),
    /// Show the backups of a cluster, and from when to when any moment can be restored
    List {
        #[command(flatten)]
        of: Of,
    },
    /// Show everything of one backup
    Show {
        #[command(flatten)]
        of: Of,
        /// A name such as 20261120T205454, first or last
        #[arg(value_name = "BACKUP")]
        backup: String,
    },
    /// Read everything of a backup back, or of all of them with their WAL, and tell what is damaged
    ///
    /// Each piece is compared with the hash that it was written with. Exits with 1 if anything is damaged or missing. With --stored nothing is
    /// decompressed, which takes a fraction of the time: it finds what a disk, a network or somebody has changed since it was stored, and not
    /// what was wrong by then.
    Verify {
        #[command(flatten)]
        of: Of,
        /// A name such as 20261120T205454, first or last [default: all of them]
        #[arg(value_name = "BACKUP")]
        backup: Option<String>,
        /// Files that are read beside each other
        #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
        jobs: u8,
        /// Compare objects as they are stored, and decompress nothing
        #[arg(long)]
        stored: bool,
    },
    Check(check::CheckArgs),
    Drill(Box<drill::DrillArgs>),
    Delete(keeping::DeleteArgs),
    /// Take the deletion of a backup back
    Undelete {
        #[command(flatten)]
        of: Of,
        /// A name such as 20261120T205454
        #[arg(value_name = "BACKUP")]
        backup: String,
    },
    Keep(keeping::KeepArgs),
    Expire(keeping::ExpireArgs),
}

impl Action {
    /// The one whose result is no document.
    fn without_json(&self) -> Option<&'static str> {
        match self {
            Action::Init { .. } => Some("init"),
            Action::Rekey(_) => Some("rekey"),
            Action::Delete(_) => Some("delete"),
            Action::Undelete { .. } => Some("undelete"),
            Action::Keep(_) => Some("keep"),
            _ => None,
        }
    }
}

pub(crate) async fn run(args: BackupArgs, global: &Global) -> Result<(), Failure> {
    if let Some(name) = args.action.without_json().filter(|_| global.json) {
        return Err(Failure::usage(format!("--json means nothing to pgherd backup {name}")));
    }
    match args.action {
        Action::Init { repository } => init(repository).await,
        Action::Rekey(args) => rekey::run(args, global).await,
        Action::Create(args) => create::run(args, global).await,
        Action::List { of } => catalog::list(&of, global).await,
        Action::Show { of, backup } => catalog::show(&of, &backup, global).await,
        Action::Verify { of, backup, jobs, stored } => {
            let depth = if stored { Depth::Stored } else { Depth::Content };
            catalog::verified(&of, backup.as_deref(), depth, jobs, global).await
        }
        Action::Check(args) => check::run(args, global).await,
        Action::Drill(args) => drill::run(*args, global).await,
        Action::Delete(args) => keeping::delete(args, global).await,
        Action::Undelete { of, backup } => keeping::undelete(&of, &backup, global).await,
        Action::Keep(args) => keeping::keep(args, global).await,
        Action::Expire(args) => keeping::expire(args, global).await,
    }
}

async fn init(repository: PathBuf) -> Result<(), Failure> {
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

/// What is wrong with a repository as a whole, or with which backup is meant.
pub(crate) fn of_catalog(error: CatalogError) -> Failure {
    let hint = error.hint();
    let failure = match error {
        CatalogError::Repository(error) => return failed(error),
        CatalogError::Malformed { .. } | CatalogError::Several { .. } => Failure::usage(error.to_string()),
        error => crate::failure::with_sources(&error),
    };
    hint.into_iter().fold(failure, Failure::hint)
}
