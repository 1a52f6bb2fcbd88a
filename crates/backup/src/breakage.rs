//! Rules that tests break on purpose, to see that something notices.
//!
//! Outside of tests every rule is kept: [`broken`] is a constant. Hazard: a switch that could be thrown in a real program;
//! so there is none to throw.

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Content of a frame is returned whatever its hash is.
    NoFrameHash,
    /// A manifest is written although WAL of its range is missing.
    ManifestBeforeWal,
    /// A different segment takes the place of the one that was there.
    WalOverwritten,
    /// A sweep does not look at intents.
    IntentsIgnored,
    /// A sweep does not look who goes on from a backup that was given up.
    FormerIgnored,
    /// A sweep does not wait until a tombstone is old enough.
    NoGrace,
    /// What was received is reported, whether it is durable or not.
    FeedbackBeforeFsync,
    /// What is in the repository is listed before it is sealed.
    ListingBeforeSeal,
    /// What was put is reported before it was asked whether somebody has sealed it.
    ReportBeforeQuestion,
    /// A sweep goes on when objects that must be there are not listed.
    ListingBelieved,
    /// What records of one resource manager change is passed over.
    KindIgnored { manager: u8 },
    /// Changes of this page of a relation are not remembered.
    PageLeftOut { block: u32 },
}

#[cfg(not(test))]
pub(crate) const fn broken(_: Broken) -> bool {
    false
}

#[cfg(test)]
pub(crate) use in_tests::{breaking, broken};

#[cfg(test)]
mod in_tests {
    use super::Broken;
    use std::cell::Cell;

    thread_local! {
        static BROKEN: Cell<Option<Broken>> = const { Cell::new(None) };
    }

    pub(crate) fn broken(rule: Broken) -> bool {
        BROKEN.get() == Some(rule)
    }

    /// Runs `work` with a rule that is not kept, on this thread.
    pub(crate) fn breaking<T>(rule: Option<Broken>, work: impl FnOnce() -> T) -> T {
        let before = BROKEN.replace(rule);
        let done = work();
        BROKEN.set(before);
        done
    }
}
