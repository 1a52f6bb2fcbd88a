//! Keeps the fence informed: what the main loop tells it at every turn, and with what it is armed.

use std::path::PathBuf;

use pgherd_core::action::Duties;
use pgherd_core::observation::Postgres;
use pgherd_core::types::{Instant, Term};

use crate::fence::{self, Arming, Handle, Target};
use crate::mind::Mind;
use crate::peers;
use crate::pki::{Credentials, sign_fenced};
use crate::server::Server;

pub(crate) struct Guard {
    handle: Handle,
    server: Server,
    credentials: Credentials,
    authorities: String,
    herd_id: String,
    data_dir: PathBuf,
    armed: Option<(Term, i32)>,
}

impl Guard {
    pub(crate) fn new(
        handle: Handle,
        server: Server,
        credentials: Credentials,
        authorities: String,
        herd_id: String,
        data_dir: PathBuf,
    ) -> Guard {
        Guard { handle, server, credentials, authorities, herd_id, data_dir, armed: None }
    }

    /// Called by the main loop at the end of each turn. Never waits.
    pub(crate) fn turn(&mut self, now: Instant, mind: &Mind, duties: &Duties) {
        if let Some(record) = mind.record() {
            let proven = mind.confirmed.filter(|(term, _)| *term == record.term).map(|(_, at)| at);
            if let Some(deadline) = fence::deadline(now, &mind.spec.times, record, proven) {
                self.handle.beat(deadline);
            }
        }
        match (duties.fence, self.server.postmaster()) {
            (Some(term), Some(postmaster)) if self.armed != Some((term, postmaster)) => {
                self.arm(mind, term, postmaster);
            }
            _ => {}
        }
        // Only once it has been seen to be no primary: a decision that merely lacks the duty proves nothing.
        let harmless =
            matches!(mind.postgres, Postgres::Standby(_) | Postgres::Stopped(_) | Postgres::Absent);
        // One that an earlier agent armed is disarmed too.
        if harmless && mind.busy.is_none() {
            self.armed = None;
            self.handle.disarm();
        }
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.handle.status().borrow().armed.is_some()
    }

    fn arm(&mut self, mind: &Mind, term: Term, postmaster: i32) {
        let Some(member) = mind.durable.member.clone() else { return };
        let message = match sign_fenced(&self.credentials, &self.herd_id, &mind.cluster, &member, term) {
            Ok(message) => message,
            Err(error) => {
                tracing::error!(%error, "cannot sign the fence's message; the fence is not armed");
                return;
            }
        };
        let targets = peers::addresses(&mind.spec, &mind.me).into_iter();
        let targets = targets.map(|(node, address)| Target { node: node.to_string(), address });
        self.handle.arm(Arming {
            term,
            postmaster,
            data_dir: self.data_dir.clone(),
            agent_grace: mind.spec.times.agent_grace,
            message,
            targets: targets.collect(),
            authorities: self.authorities.clone(),
        });
        self.armed = Some((term, postmaster));
    }
}
