//! A restored copy: recovered on a port of its own, and asked what is in it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use pgherd_agent::backups::Progress;
use pgherd_agent::backups::restore::{Plan, Report, RestoreError, Wish, plan, restore};
use pgherd_backup::manifest::Manifest;
use pgherd_core::types::Lsn;
use pgherd_postgres::Instance;
use pgherd_postgres::restoring::{Action, Come, End, FollowTimeline, Over, Recovery};
use pgherd_postgres::sql::Session;
use tokio::sync::watch;

use crate::harness::{ask, superuser, until};
use crate::original::{Original, READERS};

/// Where a copy goes, and how it is started.
pub(crate) struct Copy {
    pub(crate) instance: Instance,
}

impl Copy {
    pub(crate) async fn of(original: &Original, name: &str) -> Copy {
        Copy { instance: original.herd.node(name).await }
    }

    pub(crate) fn wish(&self, archive: &Path, end: End) -> Wish {
        Wish {
            data_dir: self.instance.data_dir.clone(),
            wal_dir: None,
            tablespaces: BTreeMap::new(),
            tablespaces_in: None,
            over: Over::Nothing,
            recovery: recovery(archive, end),
        }
    }

    /// Restores a backup as wished.
    pub(crate) async fn restore(
        &self,
        original: &Original,
        manifest: &Manifest,
        wish: Wish,
    ) -> Result<(Plan, Report), RestoreError> {
        let plan = plan(&original.repository, manifest, wish).await?;
        let progress = watch::Sender::new(Progress::default());
        let report = restore(&original.repository, plan.clone(), READERS, None, &progress).await?;
        assert_eq!(progress.borrow().done_bytes, report.bytes);
        Ok((plan, report))
    }

    /// Starts it; it shares nothing with the original but what a test is about.
    pub(crate) fn start(&self) -> Output {
        let instance = &self.instance;
        let dir = instance.socket_dir.display();
        let options = format!(
            "-p {} -k {dir} -c listen_addresses= -c ssl=off -c logging_collector=off -c log_directory={dir}",
            instance.port
        );
        std::fs::create_dir_all(&instance.log_dir).unwrap();
        Command::new(instance.installation.program("pg_ctl"))
            .args(["-D", instance.data_dir.to_str().unwrap(), "-w", "-t", "60", "-o", &options])
            .args(["-l", instance.log_dir.join("copy.log").to_str().unwrap(), "start"])
            .output()
            .unwrap()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.instance.log_dir.join("copy.log")).unwrap_or_default()
    }

    /// Recovers it to its end, where it is promoted.
    pub(crate) async fn recover(&self) -> Session {
        let started = self.start();
        assert!(started.status.success(), "{}", self.log());
        let session = superuser(&self.instance).await;
        until("recovery ends", async || {
            (ask(&session, "SELECT pg_is_in_recovery()").await == "f").then_some(())
        })
        .await;
        session
    }

    /// PostgreSQL's own check of tables and indexes.
    pub(crate) fn amcheck(&self) {
        let checked = self.program("pg_amcheck", &["--install-missing", "--heapallindexed", "--all"]);
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }

    fn program(&self, name: &str, options: &[&str]) -> Output {
        let instance = &self.instance;
        Command::new(instance.installation.program(name))
            .args(["-h", instance.socket_dir.to_str().unwrap(), "-p", &instance.port.to_string()])
            .args(["-U", "postgres"])
            .args(options)
            .output()
            .unwrap()
    }

    pub(crate) fn stop(&self) {
        let stopped = Command::new(self.instance.installation.program("pg_ctl"))
            .args(["-D", self.instance.data_dir.to_str().unwrap(), "-m", "fast", "-w", "stop"])
            .output()
            .unwrap();
        assert!(stopped.status.success(), "{stopped:?}");
    }
}

pub(crate) fn recovery(archive: &Path, end: End) -> Recovery {
    Recovery {
        restore_command: format!("cp '{}/%f' '%p'", archive.display()),
        end,
        timeline: FollowTimeline::Latest,
        action: Action::Promote,
        come: Come::Primary,
    }
}

pub(crate) fn at(lsn: Lsn) -> End {
    End::Lsn { at: lsn, inclusive: true }
}
