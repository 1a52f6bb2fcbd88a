//! What a command that needs a scratch server is told of it.

use std::path::{Path, PathBuf};

use clap::Args;
use pgherd_agent::backups::recover;
use pgherd_agent::backups::scratch::{self, Error, Order};

use crate::failure::Failure;
use crate::output::note;

/// Where there is room for what is large and need not outlive a restart.
const USUAL_PLACE: &str = "/var/tmp";

/// Where it is, and how it is run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of the scratch server")]
pub(in crate::commands) struct ScratchArgs {
    /// Directory in which the scratch server's is made; the whole cluster has to fit
    #[arg(long, value_name = "DIR", default_value = USUAL_PLACE)]
    scratch_dir: PathBuf,
    /// Superuser of the restored cluster [default: postgres, else the user who runs this]
    #[arg(long, value_name = "NAME")]
    superuser: Option<String>,
    /// Directory of PostgreSQL's programs, of the backup's version [default: the distribution's]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Libraries that recovery or the data need, as in shared_preload_libraries; none of the original's are loaded otherwise
    #[arg(long, value_name = "LIBRARIES", default_value = "", hide_default_value = true)]
    preload: String,
}

impl ScratchArgs {
    pub(in crate::commands) fn order(
        self,
        recovery: recover::Order,
        flush: bool,
        modest: bool,
    ) -> Result<Order, Failure> {
        let ScratchArgs { scratch_dir, superuser, bin_dir, preload } = self;
        let parent =
            std::path::absolute(&scratch_dir).map_err(|error| Failure::io("find", &scratch_dir, &error))?;
        Ok(Order { recovery, parent, bin_dir, superuser, preload, flush, modest })
    }
}

/// Removes what was left beside the scratch server that is to come, and says so.
pub(in crate::commands) async fn tidy(dir: &Path) {
    let Some(parent) = dir.parent() else { return };
    for left in scratch::remove_leftovers(parent).await {
        let dir = left.dir.display();
        match left.removed {
            Ok(()) => note(&format!("removed {dir}, which an earlier command that was killed had left")),
            Err(error) => {
                note(&format!("warning: {dir}, which an earlier command left, is not removed: {error}"));
            }
        }
    }
}

pub(in crate::commands) fn failed(error: Error) -> Failure {
    let hint = error.hint();
    let failure = match error {
        Error::Recover(error) => return super::failed(error),
        error @ Error::NoSpace { .. } => Failure::refused(error.to_string()),
        error => crate::failure::with_sources(&error),
    };
    hint.into_iter().fold(failure, Failure::hint)
}
