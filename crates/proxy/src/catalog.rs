//! What each database says of its functions, asked now and then of a server that somebody has there anyway.
//!
//! An old answer does no harm: a function that has learnt to write since is refused by a standby, and then the primary is
//! asked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::backend::{Backend, NotDone};
use crate::reads::{FUNCTIONS_QUERY, Functions};

const GOOD_FOR: Duration = Duration::from_secs(60);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Catalog {
    known: Mutex<HashMap<String, Known>>,
}

#[derive(Clone)]
struct Known {
    functions: Arc<Functions>,
    asked: Instant,
}

impl Catalog {
    /// What was last said, and whether that is old.
    pub(crate) fn functions(&self, database: &str) -> (Arc<Functions>, bool) {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(database) {
            Some(known) => (Arc::clone(&known.functions), known.asked.elapsed() >= GOOD_FOR),
            None => (Arc::default(), true),
        }
    }

    /// Asks that server, in which no transaction is open.
    pub(crate) async fn ask(&self, database: &str, backend: &mut Backend) -> Result<(), NotDone> {
        let asked = Instant::now();
        let keep = |functions: Option<Functions>| {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let functions = match functions {
                Some(functions) => Arc::new(functions),
                None => known.get(database).map(|known| Arc::clone(&known.functions)).unwrap_or_default(),
            };
            known.insert(database.to_owned(), Known { functions, asked });
        };
        // Meanwhile nobody else asks.
        keep(None);
        let rows = backend.values(FUNCTIONS_QUERY, &[None], ANSWER_WITHIN).await?;
        keep(Some(rows.into_iter().flatten().collect()));
        Ok(())
    }
}
