//! `pgherd man`: the manual pages.

use std::path::PathBuf;

use clap::Args;

use crate::args;
use crate::failure::Failure;
use crate::output::print_line;

/// Write the manual pages
///
/// One page for pgherd and one for each command, for section 1.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Directory to write them into
    #[arg(value_name = "DIR")]
    to: PathBuf,
}

pub(crate) fn run(args: &ManArgs) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.to).map_err(|error| Failure::io("create", &args.to, &error))?;
    clap_mangen::generate_to(args::what_there_is(), &args.to)
        .map_err(|error| Failure::io("write into", &args.to, &error))?;
    print_line(&args.to.display().to_string())
}
