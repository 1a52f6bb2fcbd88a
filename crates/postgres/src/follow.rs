//! Streaming from an upstream: a standby is pointed at it, at once.
//!
//! Order on disk: first the password, then the name of the upstream, so that a kill in between leaves a standby
//! that connects to nobody or to the right one. Nobody waits for the disk: a machine that dies meanwhile starts sealed.
//!
//! Leaves out: whether this node may follow that upstream. Hazard: a standby that follows the wrong one acknowledges
//! what it must not.

use std::time::{Duration, Instant};

use pgherd_core::types::Lsn;
use rustix::process::Signal;

use crate::conf::{self, Managed, Upstream, passfile_line, put_blocking, read_blocking};
use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::instance::Instance;
use crate::process::Server;
use crate::receivers;
use crate::roles;
use crate::secret::Secret;
use crate::sql::Session;

const FILES: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    #[error("ALTER SYSTEM has set {name}, which wins over the upstream that pgherd set")]
    Overridden { name: String },

    #[error("not streaming from {upstream} after {} ms: {state}", .after.as_millis())]
    NotStreaming { upstream: String, after: Duration, state: String },

    #[error(transparent)]
    Other(#[from] Error),
}

impl FollowError {
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            FollowError::Overridden { .. } => {
                Some("ALTER SYSTEM RESET it; the herd file decides who follows whom")
            }
            FollowError::NotStreaming { .. } => {
                Some("the WAL receiver says why in PostgreSQL's log: pgherd logs")
            }
            FollowError::Other(error) => error.hint(),
        }
    }
}

/// Writes down whom to follow, and tells a running server. One that is stopped follows when it is started.
/// `restore_command` is where WAL that the upstream no longer has can be fetched from.
pub async fn follow(
    instance: &Instance,
    server: Option<&Server>,
    upstream: &Upstream,
    password: &Secret,
    restore_command: Option<&str>,
) -> Result<(), FollowError> {
    let overridden = conf::overrides(instance).await?.into_iter().find(|found| {
        ["primary_conninfo", "primary_slot_name", "recovery_min_apply_delay"].contains(&found.name.as_str())
    });
    if let Some(found) = overridden {
        return Err(FollowError::Overridden { name: found.name });
    }
    let changed = {
        let (instance, upstream) = (instance.clone(), upstream.clone());
        let line = passfile_line(roles::REPLICATION, password);
        let restore_command = restore_command.unwrap_or_default().to_owned();
        blocking("writing down the upstream", FILES, move || {
            if durable::read(&instance.passfile())?.as_deref() != Some(line.as_bytes()) {
                durable::put(&instance.passfile(), line.as_bytes(), durable::PRIVATE)?;
            }
            let before = read_blocking(&instance)?;
            let managed = Managed { restore_command, ..before.clone().following(&instance, &upstream) };
            let changed = managed != before;
            if changed {
                put_blocking(&instance, &managed)?;
            }
            Ok::<_, Error>(changed)
        })
        .await?
    };
    if let (Some(server), true) = (server, changed) {
        // PostgreSQL changes its upstream when replay next waits for WAL. One that is paused, or waits for a reader,
        // would go on with the old one for as long. The one that the reload begins must be left alone: PostgreSQL
        // would wait for wal_retrieve_retry_interval before it tries again.
        let former = receivers::of(server, FILES).await?;
        server.reload()?;
        for receiver in former {
            receiver.signal(Signal::TERM)?;
        }
    }
    Ok(())
}

/// Waits until the WAL receiver streams from `upstream`; returns from where it started.
pub async fn streaming(
    session: &Session,
    upstream: &Upstream,
    deadline: Duration,
) -> Result<Lsn, FollowError> {
    let until = Instant::now() + deadline;
    let query = "SELECT status, coalesce(sender_host, ''), coalesce(sender_port, 0), receive_start_lsn::text \
                 FROM pg_catalog.pg_stat_wal_receiver";
    loop {
        let row = session.query_opt(query, &[]).await.map_err(Error::sql("show its WAL receiver"))?;
        let state = match row {
            None => "no WAL receiver".to_owned(),
            Some(row) => {
                let (status, host, port): (String, String, i32) = (row.get(0), row.get(1), row.get(2));
                let start: Option<String> = row.get(3);
                let same = host == upstream.address.to_string() || host == upstream.node.as_str();
                if status == "streaming" && same && port == i32::from(upstream.port) {
                    return Ok(start.and_then(|lsn| lsn.parse().ok()).unwrap_or_default());
                }
                format!("{status} from {host}:{port}")
            }
        };
        if Instant::now() >= until {
            let upstream = upstream.node.to_string();
            return Err(FollowError::NotStreaming { upstream, after: deadline, state });
        }
        tokio::time::sleep(POLL).await;
    }
}
