//! `pgherd backup check`: a repository, for monitoring.

use std::time::Duration;

use clap::Args;
use pgherd_agent::backups::check::{self as looked, Expected};
use pgherd_api::report::CheckReport;

use super::catalog::Of;
use crate::args::Global;
use crate::commands::check;
use crate::failure::Failure;

/// Check for monitoring that what should be restorable is, and that it is as new as it should be
///
/// Prints one line a check. Exits with 0 if all is well, 1 for a warning, 2 if something is critical, and 3 if it cannot be known. It looks at
/// names, manifests and ages; `pgherd backup verify` reads everything.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    of: Of,
    /// So many backups that can be restored are expected
    #[arg(long, value_name = "N", default_value_t = 1)]
    minimum_redundancy: u32,
    /// The last backup may be so old [default: any age]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    backup_maximum_age: Option<Duration>,
    /// The last backup has so many bytes at least [default: any size]
    #[arg(long, value_name = "BYTES")]
    backup_minimum_size: Option<u64>,
    /// The last segment of WAL may be so old [default: any age]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wal_maximum_age: Option<Duration>,
    /// Print one line with performance data, as monitoring plugins do
    #[arg(long, conflicts_with = "json")]
    nagios: bool,
}

pub(super) async fn run(args: CheckArgs, global: &Global) -> Result<(), Failure> {
    let expected = Expected {
        minimum_redundancy: args.minimum_redundancy,
        backup_maximum_age: args.backup_maximum_age,
        backup_minimum_bytes: args.backup_minimum_size,
        wal_maximum_age: args.wal_maximum_age,
    };
    let asked = async {
        let catalog = args.of.open(global).await?;
        looked::check(&catalog, &expected).await.map_err(super::of_catalog)
    };
    let report = match asked.await {
        Ok(report) => report,
        Err(failure) => CheckReport { checks: vec![check::unknown("repository", &failure)] },
    };
    check::told(&report, args.nagios, global)
}
