//! Makes the drill that is due, on this host, and says how it came out.
//!
//! One that the agent did not live to see the end of is begun again; what it has left is removed first, also when no drill is due. Leaves out: when and where
//! (`core::ha::archive`). Hazard: a host that has other work. So it is not begun where it would leave less than a tenth of the volume free, and it
//! has the lowest priority and few readers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use pgherd_api::backup::{Drill, DrillOutcome};
use pgherd_core::record::DrillEnd;
use pgherd_core::spec::{BackupSpec, HerdSpec};
use pgherd_core::types::NodeName;
use pgherd_postgres::disk;
use tokio::sync::{mpsc, watch};

use super::drill::{self, Wanted};
use super::recover;
use super::scratch::{self, RESERVE_BYTES};
use super::{Progress, on_a_thread};
use crate::agreed::unix_seconds;
use crate::causes::on_one_line;
use crate::main_loop::{Assigned, Event};
use crate::paths::REPOSITORY_FILE;
use crate::server::Server;

/// Beside the agent's state, unless the herd file names another place.
const DIR: &str = "drill";
const READERS: usize = 2;
/// What stays free of a volume: one part of so many.
const FREE_PART: u64 = 10;

#[derive(Clone)]
pub(crate) struct Drilling {
    pub(crate) server: Server,
    pub(crate) cluster: NodeName,
    pub(crate) node: NodeName,
    pub(crate) state_dir: PathBuf,
    pub(crate) assigned: watch::Receiver<Assigned>,
    pub(crate) spec: watch::Receiver<Arc<HerdSpec>>,
    pub(crate) events: mpsc::Sender<Event>,
}

#[derive(Debug, thiserror::Error)]
enum DrillingError {
    #[error("the herd file names no repository any more")]
    NoRepository,
    #[error("this node has no PostgreSQL")]
    NoPostgres,
    #[error("it is not known where this program is: {0}")]
    Program(std::io::Error),
    #[error(transparent)]
    Driver(#[from] pgherd_postgres::Error),
    #[error(transparent)]
    Scratch(#[from] scratch::Error),
    #[error("its thread ended early")]
    Thread(#[from] tokio::task::JoinError),
}

/// Until the agent ends.
pub(crate) async fn make_drills(mut duty: Drilling) {
    if let Some(spec) = duty.wanted() {
        remove_leftovers(&duty.dir(&spec)).await;
    }
    loop {
        if !duty.assigned.borrow_and_update().duties.drill {
            if duty.assigned.changed().await.is_err() {
                return;
            }
            continue;
        }
        let (began, at) = (Instant::now(), unix_seconds());
        tracing::info!("a drill begins");
        let making = duty.clone();
        // On a thread of its own, which may wait for processes to end; also when this task is ended.
        let made = on_a_thread(move || async move {
            let mut assigned = making.assigned.clone();
            tokio::select! {
                came = making.make() => Some(came),
                // Dropping it ends its server and removes it.
                () = not_wanted(&mut assigned) => None,
            }
        });
        let came = match made.await {
            Ok(Some(came)) => came,
            Ok(None) => {
                tracing::warn!("the drill is given up");
                continue;
            }
            Err(error) => Err(error.into()),
        };
        let (backup, failed) = match came {
            Ok(drill) => (Some(drill.backup.clone()), why(&drill)),
            Err(error) => (None, Some(on_one_line(&error))),
        };
        let seconds = began.elapsed().as_secs();
        match &failed {
            None => tracing::info!(backup, seconds, "the drill has passed"),
            Some(why) => tracing::error!(backup, seconds, why, "the drill has failed"),
        }
        let end = DrillEnd { node: duty.node.clone(), began_unix_seconds: at, seconds, backup, failed };
        if duty.events.send(Event::Drilled(Box::new(end))).await.is_err() {
            return;
        }
        not_wanted(&mut duty.assigned).await;
    }
}

/// Also if the agent ends.
async fn not_wanted(assigned: &mut watch::Receiver<Assigned>) {
    drop(assigned.wait_for(|now| !now.duties.drill).await);
}

/// The first thing that failed, with its check.
fn why(drill: &Drill) -> Option<String> {
    let failed = drill.checks.iter().find(|check| check.outcome == DrillOutcome::Failed)?;
    Some(format!("{}: {}", failed.name, failed.told.join("; ")))
}

async fn remove_leftovers(dir: &Path) {
    for left in scratch::remove_leftovers(dir).await {
        let dir = left.dir.display().to_string();
        match left.removed {
            Ok(()) => tracing::info!(dir, "removed what a drill had left"),
            Err(error) => {
                tracing::warn!(dir, error = on_one_line(&error), "what a drill has left cannot be removed");
            }
        }
    }
}

impl Drilling {
    fn wanted(&self) -> Option<BackupSpec> {
        self.spec.borrow().cluster(&self.cluster)?.backup.clone()
    }

    fn dir(&self, spec: &BackupSpec) -> PathBuf {
        spec.drill_dir.clone().unwrap_or_else(|| self.state_dir.join(DIR))
    }

    async fn make(&self) -> Result<Drill, DrillingError> {
        let spec = self.wanted().ok_or(DrillingError::NoRepository)?;
        let system = self.assigned.borrow().system.map(|system| system.to_string());
        let instance = self.server.instance().ok_or(DrillingError::NoPostgres)?;
        let parent = self.dir(&spec);
        remove_leftovers(&parent).await;
        let program = std::env::current_exe().map_err(DrillingError::Program)?;
        let everything = recover::Order::of_everything(self.state_dir.join(REPOSITORY_FILE), program);
        let recovery = recover::Order { system, ..everything };
        let order = scratch::Order {
            recovery,
            bin_dir: Some(instance.installation.bin_dir.clone()),
            superuser: None,
            preload: String::new(),
            flush: true,
            modest: true,
            parent: parent.clone(),
        };
        let ready = scratch::prepare(order).await?;
        let there = parent.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/")).to_owned();
        let total = disk::space(&there)?.total_bytes;
        ready.check(RESERVE_BYTES.saturating_add(total / FREE_PART))?;
        // Those of the file were read when it was applied.
        let queries = spec.drill_queries.iter().filter_map(|query| query.parse().ok()).collect();
        let (progress, _) = watch::channel(Progress::default());
        Ok(drill::run(ready, &Wanted { queries, without_amcheck: false }, READERS, None, &progress).await)
    }
}

#[cfg(test)]
mod tests {
    use pgherd_api::backup::DrillCheck;

    use super::*;

    #[test]
    fn the_first_failure_is_told_with_its_check() {
        let check = |name: &str, outcome| DrillCheck {
            name: name.to_owned(),
            outcome,
            told: vec!["one".to_owned(), "two".to_owned()],
            seconds: 0.0,
        };
        let mut drill = Drill {
            repository: String::new(),
            system_identifier: String::new(),
            postgresql_version: String::new(),
            backup: String::new(),
            target: String::new(),
            at: String::new(),
            passed: true,
            seconds: 0.0,
            files: 0,
            bytes: 0,
            restore_seconds: None,
            recovery: None,
            checks: vec![check("recovery", DrillOutcome::Passed), check("indexes", DrillOutcome::Skipped)],
        };
        assert_eq!(why(&drill), None);
        drill.checks.push(check("checksums", DrillOutcome::Failed));
        assert_eq!(why(&drill).as_deref(), Some("checksums: one; two"));
    }
}
