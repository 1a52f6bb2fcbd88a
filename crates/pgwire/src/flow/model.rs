//! A server by the book, for comparison: every state it may be in, given what was sent and what it said.
//!
//! Nothing here is shared with the machine that it checks, and it works the other way round: it does not ask
//! which request an answer belongs to, it lets a server read message after message as `PostgresMain` does,
//! with everything that it may choose to say. What no such server can have said is illegal. Leaves out all
//! contents. Hazard: a mistake that both make stays unseen, which is why there is also a test against a real
//! server.

use std::collections::BTreeSet;

use super::{Answer, Request};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Does {
    /// Waits for a message. `batch`: inside an extended batch.
    Reads {
        batch: bool,
    },
    /// Throws messages away until Sync.
    Skips,
    Parses,
    Binds,
    Closes,
    DescribesStatement,
    DescribesRows,
    Executes {
        rows: bool,
    },
    Synchronises,
    Queries {
        complete: bool,
    },
    Rows,
    Calls,
    /// Says ReadyForQuery next and nothing else.
    IsDone,
    /// A FunctionCall has its value; the commit may still fail.
    Called,
    CopiesIn {
        simple: bool,
    },
    CopiedIn {
        simple: bool,
    },
    /// The client wants the COPY to fail.
    MustFail {
        simple: bool,
    },
    CopiesOut {
        simple: bool,
    },
    CopiedOut,
    CopiesBoth {
        client: bool,
        server: bool,
    },
    /// Read what it cannot make sense of: it can only say FATAL.
    Dies,
    Gone,
}

/// All states the server may be in: how many messages it has read, and what it does.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    sent: Vec<Request>,
    states: BTreeSet<(usize, Does)>,
}

impl Model {
    pub(crate) fn new() -> Model {
        Model { sent: Vec::new(), states: BTreeSet::from([(0, Does::Reads { batch: false })]) }
    }

    pub(crate) fn send(&mut self, request: Request) {
        self.sent.push(request);
        self.read_on();
    }

    /// Everything that may have been read by now is.
    fn read_on(&mut self) {
        let mut fresh: Vec<(usize, Does)> = self.states.iter().copied().collect();
        while let Some((read, does)) = fresh.pop() {
            let Some(request) = self.sent.get(read) else { continue };
            if let Some(next) = reads(does, *request)
                && self.states.insert((read + 1, next))
            {
                fresh.push((read + 1, next));
            }
        }
    }

    /// Whether any server could say this now; if so, only such servers remain.
    pub(crate) fn says(&mut self, answer: Answer) -> bool {
        let possible: BTreeSet<_> =
            self.states.iter().filter_map(|(read, does)| Some((*read, says(*does, answer)?))).collect();
        if possible.is_empty() {
            return false;
        }
        self.states = possible;
        self.read_on();
        true
    }

    pub(crate) fn could_say(&self, answer: Answer) -> bool {
        self.states.iter().any(|(_, does)| says(*does, answer).is_some())
    }

    /// Some server that fits may still owe something or be in the middle of something.
    pub(crate) fn may_be_busy(&self) -> bool {
        let idle = Does::Reads { batch: false };
        // States that stopped reading early are not the last ones: a server reads on.
        let stuck = |(read, does): &&(usize, Does)| {
            *read == self.sent.len() || reads(*does, self.sent[*read]).is_none() || can_speak(*does)
        };
        self.states.iter().filter(stuck).any(|(read, does)| *read < self.sent.len() || *does != idle)
    }
}

fn can_speak(does: Does) -> bool {
    !matches!(does, Does::Reads { .. } | Does::Skips)
}

fn reads(does: Does, request: Request) -> Option<Does> {
    use Request::*;
    Some(match does {
        Does::Reads { batch } => match request {
            Query => Does::Queries { complete: false },
            FunctionCall => Does::Calls,
            Parse => Does::Parses,
            Bind => Does::Binds,
            Close => Does::Closes,
            DescribeStatement => Does::DescribesStatement,
            DescribePortal => Does::DescribesRows,
            Execute => Does::Executes { rows: false },
            Sync => Does::Synchronises,
            Flush | CopyData | CopyDone | CopyFail => Does::Reads { batch },
            Terminate => Does::Gone,
        },
        Does::Skips => match request {
            Sync => Does::Synchronises,
            Terminate => Does::Gone,
            _ => Does::Skips,
        },
        Does::CopiesIn { simple } => match request {
            CopyData | Sync | Flush => does,
            CopyDone => Does::CopiedIn { simple },
            CopyFail => Does::MustFail { simple },
            _ => Does::Dies,
        },
        Does::CopiesBoth { client: false, server } => match request {
            // A walsender closes the connection on Flush. Nothing is owed either way.
            CopyData | Flush => does,
            CopyDone if server => Does::Queries { complete: false },
            CopyDone => Does::CopiesBoth { client: true, server },
            _ => Does::Dies,
        },
        _ => return None,
    })
}

fn says(does: Does, answer: Answer) -> Option<Does> {
    use Answer::*;
    let batch = Does::Reads { batch: true };
    if does == Does::Gone {
        return None;
    }
    Some(match (does, answer) {
        (_, Asynchronous) => does,
        (_, Error { fatal: true }) => Does::Gone,
        (Does::Reads { .. } | Does::Skips | Does::Dies | Does::IsDone, Error { .. }) => return None,
        (
            Does::Queries { .. } | Does::Rows | Does::Calls | Does::Called | Does::Synchronises,
            Error { .. },
        ) => Does::IsDone,
        (Does::CopiesBoth { .. }, Error { .. }) => Does::IsDone,
        (
            Does::CopiesIn { simple }
            | Does::CopiedIn { simple }
            | Does::MustFail { simple }
            | Does::CopiesOut { simple },
            Error { .. },
        ) => {
            if simple {
                Does::IsDone
            } else {
                Does::Skips
            }
        }
        (_, Error { .. }) => Does::Skips,

        (Does::Parses, ParseComplete) | (Does::Binds, BindComplete) | (Does::Closes, CloseComplete) => batch,
        (Does::DescribesStatement, ParameterDescription) => Does::DescribesRows,
        (Does::DescribesRows, RowDescription | NoData) => batch,
        (Does::Executes { .. }, DataRow) => Does::Executes { rows: true },
        (Does::Executes { .. }, CommandComplete | PortalSuspended) => batch,
        (Does::Executes { rows: false }, EmptyQuery) => batch,
        (Does::Executes { rows: false }, CopyIn) => Does::CopiesIn { simple: false },
        (Does::Executes { rows: false }, CopyOut) => Does::CopiesOut { simple: false },
        (Does::CopiedIn { simple: false } | Does::CopiedOut, CommandComplete) => batch,

        (Does::Queries { .. } | Does::Rows, RowDescription) => Does::Rows,
        (Does::Queries { .. } | Does::Rows, CommandComplete) => Does::Queries { complete: true },
        (Does::Queries { complete: false }, EmptyQuery) => Does::Queries { complete: true },
        (Does::Queries { .. }, CopyIn) => Does::CopiesIn { simple: true },
        (Does::Queries { .. }, CopyOut) => Does::CopiesOut { simple: true },
        (Does::Queries { .. }, CopyBoth) => Does::CopiesBoth { client: false, server: false },
        (Does::Rows, DataRow) => Does::Rows,
        (Does::CopiedIn { simple: true }, CommandComplete) => Does::Queries { complete: true },
        (Does::CopiesOut { .. }, CopyData) => does,
        (Does::CopiesOut { simple: true }, CopyDone) => Does::Queries { complete: false },
        (Does::CopiesOut { simple: false }, CopyDone) => Does::CopiedOut,
        (Does::CopiesBoth { server: false, .. }, CopyData) => does,
        (Does::CopiesBoth { client: true, server: false }, CopyDone) => Does::Queries { complete: false },
        (Does::CopiesBoth { client: false, server: false }, CopyDone) => {
            Does::CopiesBoth { client: false, server: true }
        }
        (Does::CopiesBoth { .. }, CommandComplete) => Does::Gone,
        (Does::Calls, FunctionCallResponse) => Does::Called,
        (Does::Queries { complete: true } | Does::Synchronises | Does::Called | Does::IsDone, Ready(_)) => {
            Does::Reads { batch: false }
        }
        _ => return None,
    })
}
