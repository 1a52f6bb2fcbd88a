//! How many clients there are of each user and each database.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Names of users or databases, with the clients of each.
#[derive(Debug, Default)]
pub(crate) struct Census {
    clients: Mutex<HashMap<String, usize>>,
}

impl Census {
    fn clients(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more of this name, as long as that lives; `None` if there are `most` already.
    pub(crate) fn enter(self: &Arc<Census>, name: &str, most: Option<usize>) -> Option<Counted> {
        let mut clients = self.clients();
        let count = clients.entry(name.to_owned()).or_default();
        if most.is_some_and(|most| *count >= most) {
            return None;
        }
        *count += 1;
        Some(Counted { census: Arc::clone(self), name: name.to_owned() })
    }
}

#[derive(Debug)]
pub(crate) struct Counted {
    census: Arc<Census>,
    name: String,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut clients = self.census.clients();
        if let Some(count) = clients.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_counted_for_longer_than_he_is_there() {
        let census = Arc::new(Census::default());
        let first = census.enter("alice", Some(2)).unwrap();
        let second = census.enter("alice", Some(2)).unwrap();
        assert!(census.enter("alice", Some(2)).is_none() && census.enter("bob", Some(2)).is_some());
        drop(first);
        assert!(census.enter("alice", Some(2)).is_some());
        drop(second);
        assert!(census.clients().is_empty());
    }
}
