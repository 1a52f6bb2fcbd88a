//! A data directory is copied from another node with `pg_basebackup`, or filled by somebody else ([`Filling`]).
//!
//! It is made beside its place and put there when it is whole (module `making`); it gets this node's configuration
//! with the gate closed and connects to nobody before it is told to. Leaves out: reading a repository.
//!
//! Hazard: takes disk and network of its source; it can be throttled, and dropping the future ends it.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use pgherd_core::types::Member;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::sync::watch;

use crate::conf::{self, ConfError, Conninfo, Settings, passfile_line, slot_name};
use crate::control::ControlFile;
use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::hba::{self, Gate, HbaError, Rules};
use crate::instance::Instance;
use crate::making::{self, Making, MakingError};
use crate::roles;
use crate::secret::Secret;
use crate::sql::{Remote, Session};

const FILES: Duration = Duration::from_secs(600);
const LIST_TABLESPACES: Duration = Duration::from_secs(10);
/// Its own name, so that a clone is never counted as the member that it becomes.
const APPLICATION: &str = "pgherd_clone";
/// Of what the program says, how much an error quotes.
const QUOTED_LINES: usize = 8;

/// Where from and how.
#[derive(Clone, Debug)]
pub struct CloneOrder {
    /// The source, as the monitor reaches it; the same address serves replication.
    pub source: Remote,
    pub replication_password: Secret,
    /// This member's slot on the source, made before: it keeps WAL from the copy's beginning until the new node
    /// connects. `None`: only for the time of the copy.
    pub slot: Option<Member>,
    /// Kilobytes a second; PostgreSQL takes 32 to 1,048,576. `None`: as fast as it goes.
    pub max_rate_kb: Option<u32>,
    /// Each tablespace's directory on the source, and where it is to be here. One that is not named is refused.
    pub tablespaces: Vec<(String, String)>,
    /// Without progress for so long, the clone is given up.
    pub stall: Duration,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub done_bytes: u64,
    /// An estimate that the source makes at the beginning; 0 while unknown.
    pub total_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloneError {
    #[error("{source_node} has a tablespace in {location}, and no place is named for it here")]
    Tablespace { source_node: String, location: String },

    #[error("the clone from {source_node} made no progress for {} s", .after.as_secs())]
    Stalled { source_node: String, after: Duration },

    #[error("pg_basebackup from {source_node} failed ({status}): {output}")]
    Failed { source_node: String, status: ExitStatus, output: String },

    #[error(transparent)]
    Making(#[from] MakingError),
    #[error(transparent)]
    Conf(#[from] ConfError),
    #[error(transparent)]
    Hba(#[from] HbaError),
    #[error(transparent)]
    Other(#[from] Error),
}

impl CloneError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            CloneError::Tablespace { .. } => {
                Some("tablespaces are not managed: put the tables into pg_default")
            }
            CloneError::Failed { output, .. } if output.contains("No space left") => {
                Some("free space and try again")
            }
            CloneError::Making(error) => error.hint(),
            CloneError::Conf(error) => error.hint(),
            CloneError::Other(error) => error.hint(),
            _ => None,
        }
    }
}

/// A member's data directory on its way: made empty, filled by its owner, and put in its place.
#[derive(Debug)]
pub struct Filling {
    instance: Instance,
    making: Making,
}

impl Filling {
    /// Refuses a directory that has anything in it. What is not finished, the next one removes.
    pub async fn begin(instance: &Instance) -> Result<Filling, CloneError> {
        let instance = instance.clone();
        let making = {
            let instance = instance.clone();
            blocking("making a data directory", FILES, move || Making::begin(&instance)).await?
        };
        Ok(Filling { instance, making })
    }

    /// Where a restore of a base backup goes.
    pub fn data_dir(&self) -> &Path {
        &self.making.data_dir
    }

    /// Where `pg_wal` has to lead; `None`: it is inside.
    pub fn wal_dir(&self) -> Option<&Path> {
        self.making.wal_dir.as_deref()
    }

    /// Puts a segment or a history into `pg_wal`, durably.
    pub async fn put_wal(&self, name: String, content: impl AsRef<[u8]> + Send + 'static) -> Result<()> {
        let path = self.making.data_dir.join("pg_wal").join(name);
        blocking("writing WAL", FILES, move || durable::write(&path, content.as_ref(), durable::PRIVATE))
            .await
    }

    /// With everything there: the files of the node that was copied came along, and this node's take their place before anybody can
    /// start it.
    pub async fn finish(self, settings: &Settings) -> Result<ControlFile, CloneError> {
        let Filling { instance, making } = self;
        let control = {
            let dir = making.data_dir.clone();
            blocking("reading the copy", FILES, move || {
                for name in [conf::AUTO_CONF, conf::MANAGED_CONF, conf::CONF, "pg_hba.conf", "pg_ident.conf"]
                {
                    durable::remove(&dir.join(name))?;
                }
                durable::write(&dir.join(conf::AUTO_CONF), b"", durable::PRIVATE)?;
                durable::touch(&dir.join("standby.signal"))?;
                ControlFile::of(&dir)
            })
            .await?
        };
        let settings = Settings {
            at_least: Some(control.limits),
            data_checksums: control.data_checksums,
            ..settings.clone()
        };
        conf::write_into(&instance, &settings, &making.data_dir).await?;
        hba::write_into(&instance, Gate::Closed, &Rules::default(), &making.data_dir).await?;
        blocking("finishing a clone", FILES, move || making.finish()).await?;
        Ok(control)
    }
}

/// Fills an empty data directory. Dropping the future ends the program; the next clone removes what it left.
pub async fn clone(
    instance: &Instance,
    settings: &Settings,
    order: &CloneOrder,
    progress: watch::Sender<Progress>,
) -> Result<ControlFile, CloneError> {
    refuse_tablespaces(order).await?;
    let filling = Filling::begin(instance).await?;
    let passfile = instance.private_dir.join("clone.pgpass");
    {
        let (passfile, line) =
            (passfile.clone(), passfile_line(roles::REPLICATION, &order.replication_password));
        blocking("handing over a password", FILES, move || {
            durable::write(&passfile, line.as_bytes(), durable::PRIVATE)
        })
        .await?;
    }
    let conninfo = Conninfo {
        host: &order.source.host,
        address: order.source.address,
        port: order.source.port,
        user: roles::REPLICATION,
        application_name: APPLICATION,
        database: None,
        passfile: &passfile,
        tls: &instance.tls,
    }
    .to_string();
    let copied = run(instance, &filling.making, order, &conninfo, &progress).await;
    blocking("removing a password", FILES, move || durable::remove(&passfile)).await?;
    copied?;
    filling.finish(settings).await
}

/// Removes what a clone or an initdb left that was cut off. For the agent's start.
pub async fn remove_leftovers(instance: &Instance) -> Result<()> {
    let instance = instance.clone();
    blocking("removing an unfinished data directory", FILES, move || making::remove_leftovers(&instance))
        .await
}

/// Removes a data directory of pgherd's, at once from its place and then from the disk. The server must be stopped, and
/// rule 11 fulfilled.
pub async fn discard(instance: &Instance) -> Result<(), MakingError> {
    let instance = instance.clone();
    blocking("removing a data directory", FILES, move || making::discard(&instance)).await
}

async fn refuse_tablespaces(order: &CloneOrder) -> Result<(), CloneError> {
    let session = Session::remote(&order.source, LIST_TABLESPACES).await?;
    let query = "SELECT pg_catalog.pg_tablespace_location(oid) FROM pg_catalog.pg_tablespace \
                 WHERE spcname NOT IN ('pg_default', 'pg_global')";
    let rows = crate::error::within("listing tablespaces", LIST_TABLESPACES, async {
        session.query(query, &[]).await.map_err(Error::sql("list its tablespaces"))
    })
    .await?;
    for row in rows {
        let location: String = row.get(0);
        if !order.tablespaces.iter().any(|(there, _)| *there == location) {
            return Err(CloneError::Tablespace { source_node: order.source.host.clone(), location });
        }
    }
    Ok(())
}

/// Ends the whole group: `pg_basebackup` streams WAL in a process of its own.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0.take() {
            // It may have ended by itself in the meantime.
            kill_process_group(leader, Signal::KILL).ok();
        }
    }
}

async fn run(
    instance: &Instance,
    making: &Making,
    order: &CloneOrder,
    conninfo: &str,
    progress: &watch::Sender<Progress>,
) -> Result<(), CloneError> {
    let program = instance.installation.program("pg_basebackup");
    let mut command = tokio::process::Command::new(&program);
    command
        .arg("-D")
        .arg(&making.data_dir)
        .args(["-d", conninfo, "--wal-method=stream", "--checkpoint=fast", "--progress", "--no-password"])
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(wal_dir) = &making.wal_dir {
        command.arg(format!("--waldir={}", wal_dir.display()));
    }
    if let Some(slot) = &order.slot {
        command.arg(format!("--slot={}", slot_name(slot)));
    }
    if let Some(rate) = order.max_rate_kb {
        command.arg(format!("--max-rate={rate}"));
    }
    for (there, here) in &order.tablespaces {
        command.arg(format!(
            "--tablespace-mapping={}={}",
            there.replace('=', "\\="),
            here.replace('=', "\\=")
        ));
    }
    let mut child = command.spawn().map_err(Error::io("run", &program))?;
    let leader = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let mut group = Group(leader);
    let stderr = child.stderr.take().expect("it was piped");

    let mut said: Vec<String> = Vec::new();
    let mut lines = BufReader::new(stderr.take(u64::MAX)).split(b'\n');
    loop {
        let line = match tokio::time::timeout(order.stall, lines.next_segment()).await {
            Err(_) => {
                drop(group);
                return Err(CloneError::Stalled {
                    source_node: order.source.host.clone(),
                    after: order.stall,
                });
            }
            Ok(read) => read.map_err(Error::io("read what it says:", &program))?,
        };
        let Some(line) = line else { break };
        for line in String::from_utf8_lossy(&line).split('\r') {
            match parse_progress(line) {
                Some(now) => {
                    progress.send_replace(now);
                }
                None if line.trim().is_empty() => {}
                None => {
                    said.push(line.trim().to_owned());
                    if said.len() > QUOTED_LINES {
                        said.remove(0);
                    }
                }
            }
        }
    }
    let status = child.wait().await.map_err(Error::io("wait for", &program))?;
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    Err(CloneError::Failed { source_node: order.source.host.clone(), status, output: said.join("; ") })
}

/// From `23456/34567 kB (67%), 0/1 tablespace (...data/base/5/1259)`.
pub(crate) fn parse_progress(line: &str) -> Option<Progress> {
    let (done, rest) = line.trim().split_once('/')?;
    let (total, _) = rest.split_once(" kB (")?;
    let bytes = |kb: &str| Some(kb.trim().parse::<u64>().ok()? << 10);
    Some(Progress { done_bytes: bytes(done)?, total_bytes: bytes(total)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_as_pg_basebackup_prints_it() {
        let progress =
            parse_progress("    32/ 23120 kB (0%), 0/1 tablespace (/x/data/backup_label    )").unwrap();
        assert_eq!(progress, Progress { done_bytes: 32 << 10, total_bytes: 23120 << 10 });
        assert_eq!(
            parse_progress("23120/23120 kB (100%), 1/1 tablespace"),
            Some(Progress { done_bytes: 23120 << 10, total_bytes: 23120 << 10 })
        );
        for other in ["waiting for checkpoint", "pg_basebackup: error: connection to server failed", ""] {
            assert_eq!(parse_progress(other), None);
        }
    }
}
