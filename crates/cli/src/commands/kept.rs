//! Places of other programs on a command line: what pgBackRest and Barman have kept.

use std::path::PathBuf;

use clap::Args;
use pgherd_agent::backups::foreign::{ForeignRestoreError, Source};

use crate::failure::Failure;

/// A place of another program, and whose backups in it.
#[derive(Debug, Args)]
pub(crate) struct KeptArgs {
    /// Directory of a pgBackRest repository, its repo1-path, instead of a repository of pgherd
    #[arg(long, value_name = "DIR", conflicts_with_all = ["repository", "from_barman"])]
    pub(crate) from_pgbackrest: Option<PathBuf>,
    /// Stanza in it [default: the only one]
    #[arg(long, value_name = "NAME", requires = "from_pgbackrest", conflicts_with = "from_barman")]
    pub(crate) stanza: Option<String>,
    /// Directory of Barman, its barman_home, instead of a repository of pgherd
    #[arg(long, value_name = "DIR", conflicts_with = "repository")]
    pub(crate) from_barman: Option<PathBuf>,
    /// Server in it [default: the only one]
    #[arg(long, value_name = "NAME", requires = "from_barman", conflicts_with = "from_pgbackrest")]
    pub(crate) server: Option<String>,
}

impl KeptArgs {
    pub(crate) fn source(&self) -> Option<Source> {
        let KeptArgs { from_pgbackrest, stanza, from_barman, server } = self;
        let pgbackrest = from_pgbackrest.clone();
        let pgbackrest =
            pgbackrest.map(|repository| Source::PgBackRest { repository, stanza: stanza.clone() });
        let barman = from_barman.clone().map(|home| Source::Barman { home, server: server.clone() });
        pgbackrest.or(barman)
    }
}

pub(super) fn of_foreign(error: ForeignRestoreError) -> Failure {
    if let ForeignRestoreError::Recover(error) = error {
        return super::restore::failed(error);
    }
    let hint = error.hint();
    let failure = match &error {
        error if error.is_refusal() => Failure::refused(error.to_string()),
        error => crate::failure::with_sources(error),
    };
    hint.into_iter().fold(failure, Failure::hint)
}
