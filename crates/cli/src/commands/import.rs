//! `pgherd import`: other proxies' files as the `[proxy]` part of a herd file.

use std::path::PathBuf;

use clap::Args;
use pgherd_agent::import::{ImportError, import};

use crate::args::Global;
use crate::failure::Failure;
use crate::output::{note, print, print_json};

/// Turn pgbouncer.ini and pgpool.conf into the proxy part of a herd file
///
/// Reads the files, what they include, and the hba files that they name or that lie beside them; no file of
/// passwords is opened. Prints what belongs into the herd file, each line with where it comes from, and as
/// remarks what pgherd does by itself, what is not taken, and why. Exits with 1 if something is not known.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// pgbouncer.ini or pgpool.conf, whatever they are called; where two say the same, the first counts
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

pub(crate) fn run(args: &ImportArgs, global: &Global) -> Result<(), Failure> {
    let imported = import(&args.files).map_err(failed)?;
    match global.json {
        true => print_json(&imported)?,
        false => print(&imported.to_toml())?,
    }
    if imported.has_unknown() {
        note("some settings are not known; they are listed as unknown");
        return Err(Failure::Silent(1));
    }
    Ok(())
}

fn failed(error: ImportError) -> Failure {
    match error {
        ImportError::Read { path, source } => Failure::io("read", &path, &source),
        error => Failure::failed(error.to_string())
            .hint("the files are those of PgBouncer or Pgpool-II, as these programs read them"),
    }
}
