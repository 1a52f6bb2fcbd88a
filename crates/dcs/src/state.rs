//! The pure transition at the heart of every store: a transaction, applied to the keys.
//!
//! Left out: who orders the transactions. Hazard: members of a Raft store apply the same log on their own, so
//! nothing here may depend on anything but the state and the transaction; no limits, no clock.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::store::{Entry, Revision, Snapshot, Transaction};

#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    revision: Revision,
    bytes: usize,
    entries: Arc<BTreeMap<Arc<str>, Arc<Entry>>>,
}

/// The key whose check failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conflict(pub(crate) String);

impl State {
    pub(crate) fn new(revision: Revision, entries: BTreeMap<Arc<str>, Arc<Entry>>) -> State {
        let bytes = entries.iter().map(|(key, entry)| key.len() + entry.value.len()).sum();
        State { revision, bytes, entries: Arc::new(entries) }
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    /// Applies `transaction` as the commit `revision`, or changes nothing.
    pub(crate) fn apply(&mut self, transaction: &Transaction, revision: Revision) -> Result<(), Conflict> {
        for check in &transaction.checks {
            let found = self.entries.get(check.key.as_str()).map(|entry| entry.revision);
            if found != check.revision {
                return Err(Conflict(check.key.clone()));
            }
        }
        // Copies the map only while a snapshot of the state before is still held somewhere.
        let entries = Arc::make_mut(&mut self.entries);
        for (key, value) in &transaction.puts {
            let entry = Arc::new(Entry { value: value.clone(), revision });
            self.bytes += key.len() + value.len();
            if let Some(before) = entries.insert(Arc::from(key.as_str()), entry) {
                self.bytes -= key.len() + before.value.len();
            }
        }
        for key in &transaction.deletes {
            if let Some(before) = entries.remove(key.as_str()) {
                self.bytes -= key.len() + before.value.len();
            }
        }
        self.revision = revision;
        Ok(())
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot::new(self.revision, self.bytes, Arc::clone(&self.entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_or_nothing() {
        let mut state = State::default();
        let both = Transaction::new().require_absent("a").require_absent("b").put("a", "1").put("b", "1");
        assert_eq!(state.apply(&both, Revision(7)), Ok(()));
        let half =
            Transaction::new().require("a", Revision(7)).require("b", Revision(6)).put("a", "2").delete("b");
        assert_eq!(state.apply(&half, Revision(8)), Err(Conflict("b".into())));
        assert_eq!(state.revision, Revision(7), "a refused transaction leaves no trace");
        assert_eq!(state.snapshot().get("a").unwrap().value, b"1");
        let right = Transaction::new().require("a", Revision(7)).put("a", "2").delete("b");
        assert_eq!(state.apply(&right, Revision(9)), Ok(()));
        assert_eq!(state.snapshot().get("a").unwrap().revision, Revision(9));
        assert!(state.snapshot().get("b").is_none());
        assert_eq!(state.bytes, 2, "key a and its one byte");
    }

    #[test]
    fn an_earlier_snapshot_does_not_change() {
        let mut state = State::default();
        state.apply(&Transaction::new().put("a", "1"), Revision(1)).unwrap();
        let before = state.snapshot();
        state.apply(&Transaction::new().put("a", "2"), Revision(2)).unwrap();
        assert_eq!(before.get("a").unwrap().value, b"1");
    }
}
