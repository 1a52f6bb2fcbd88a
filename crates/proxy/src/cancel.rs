//! Cancel requests: who a key belongs to, and what of it is being done where.
//!
//! A client gets a number and a key of the proxy's own, and its cancel goes to whatever server is its own at that moment,
//! or nowhere. While one is on its way the server is not given to anybody else, so that it cannot hit another client's
//! statement (pgbouncer issue 38).
//!
//! Hazard: a key that can be guessed lets anybody cancel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::constant_time;

use crate::backend::{self, Cancelable};
use crate::net::ServerTls;
use crate::world::{NoRandomness, random};

/// As of protocol 3.0. PostgreSQL's own key with 3.2.
const KEY_BYTES: usize = 4;
const LONG_KEY_BYTES: usize = 32;

/// The server that a client has now. Held while a cancel is on its way to it.
pub(crate) type Slot = Arc<tokio::sync::Mutex<Option<Arc<Cancelable>>>>;

#[derive(Debug, Default)]
pub(crate) struct Cancels {
    by_pid: Mutex<HashMap<u32, (Vec<u8>, Slot)>>,
}

/// A client's number and key; forgotten when it is dropped.
pub(crate) struct Ticket {
    cancels: Arc<crate::world::World>,
    pub(crate) pid: u32,
    pub(crate) key: Vec<u8>,
    pub(crate) slot: Slot,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.cancels.cancels.known().remove(&self.pid);
    }
}

impl Cancels {
    fn known(&self) -> MutexGuard<'_, HashMap<u32, (Vec<u8>, Slot)>> {
        self.by_pid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `long`: the client speaks a protocol with long keys.
    pub(crate) fn enter(world: &Arc<crate::world::World>, long: bool) -> Result<Ticket, NoRandomness> {
        let mut key = random::<LONG_KEY_BYTES>()?.to_vec();
        if !long {
            key.truncate(KEY_BYTES);
        }
        let slot = Slot::default();
        let mut known = world.cancels.known();
        let pid = loop {
            // A process number for whoever shows it as one: positive, and free.
            let pid = u32::from_ne_bytes(random::<4>()?) & 0x7fff_ffff;
            if pid != 0 && !known.contains_key(&pid) {
                break pid;
            }
        };
        known.insert(pid, (key.clone(), Arc::clone(&slot)));
        drop(known);
        Ok(Ticket { cancels: Arc::clone(world), pid, key, slot })
    }

    /// Does nothing if nobody has this key, and does not tell.
    pub(crate) async fn cancel(&self, pid: u32, key: &[u8], tls: &dyn ServerTls) {
        let slot = match self.known().get(&pid) {
            Some((known, slot)) if constant_time::verify_slices_are_equal(known, key).is_ok() => {
                Arc::clone(slot)
            }
            _ => return,
        };
        let held = slot.lock().await;
        if let Some(who) = &*held {
            backend::cancel(who, tls).await;
        }
    }
}
