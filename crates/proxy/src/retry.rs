//! What a client asked first of the server that it has, kept until it hears anything of the answer.
//!
//! Until then it can be asked once more: of another server if this one is lost and it only reads ([`crate::share`]), or
//! anew if a statement that somebody else had prepared here was older than a table, of which this client knows nothing.
//! Nothing is held back for that but a server's last word ([`Retry::take_last_word`]); whatever the client hears ends it.
//!
//! Leaves out whether asking once more is safe. Hazard: an answer that was heard in part, and then comes once more.

use bytes::{Bytes, BytesMut};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::frame::HEADER_BYTES;
use pgherd_pgwire::message::ServerMessage;

use crate::session::{Fault, Pass, Passed, REVALIDATE, Session};

/// What is longer is not kept.
pub(crate) const MAX_KEPT_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub(crate) struct Retry {
    asked: Bytes,
    is_sent: bool,
    is_outdated: bool,
    /// With which the server has ended the session, before anything else of its answer. In a box, so that clients who wait are
    /// small.
    last_word: Option<Box<BytesMut>>,
}

impl Retry {
    /// `asked`: all up to the first Query or Sync, and nothing behind it.
    pub(crate) fn new(asked: &[u8]) -> Retry {
        Retry { asked: Bytes::copy_from_slice(asked), is_sent: false, is_outdated: false, last_word: None }
    }

    pub(crate) fn asked(&self) -> &[u8] {
        &self.asked
    }

    pub(crate) fn into_asked(self) -> Bytes {
        self.asked
    }

    /// The server has refused it for a statement that is older than a table, and the client hears nothing of that.
    pub(crate) fn is_outdated(&self) -> bool {
        self.is_outdated
    }

    /// The server has ended the session, and its client has not heard that.
    pub(crate) fn has_last_word(&self) -> bool {
        self.last_word.is_some()
    }

    /// For the client, if nobody else can be asked.
    pub(crate) fn take_last_word(&mut self) -> BytesMut {
        self.last_word.take().map_or_else(BytesMut::new, |word| *word)
    }

    /// Something of the client is sent. `false`: it is more than what was asked first.
    pub(crate) fn sends(&mut self) -> bool {
        !std::mem::replace(&mut self.is_sent, true)
    }

    /// Shows the session what came from the server, and whether it is the end of this: the client hears something.
    pub(crate) fn show<'a>(
        &mut self,
        session: &mut Session,
        chunk: &'a [u8],
        edited: &mut BytesMut,
    ) -> Result<(Passed<'a>, bool), Fault> {
        self.is_outdated |= tells_of_a_change(chunk) && session.uses_only_new(&self.asked);
        let mut passed = session.from_server(chunk, edited)?;
        if self.is_outdated {
            edited.clear();
            passed.pass = Pass::AsItCame(&[]);
        }
        // By the shutdown of a server, or when a standby is about to be promoted. What is behind it is no answer any more.
        if session.server_has_ended() && is_shutdown(chunk) {
            self.last_word = Some(Box::new(match passed.pass {
                Pass::AsItCame(bytes) => BytesMut::from(bytes),
                Pass::Edited => edited.split(),
            }));
            edited.clear();
            passed.pass = Pass::AsItCame(&[]);
        }
        let is_heard = match passed.pass {
            Pass::AsItCame(bytes) => !bytes.is_empty(),
            Pass::Edited => !edited.is_empty(),
        };
        Ok((passed, is_heard))
    }
}

/// Is this the error by which a server that is told to ends a session, with nothing before it but what columns there would have been?
/// That much PostgreSQL has written of a query that runs, and sends it with whatever comes next.
fn is_shutdown(mut answer: &[u8]) -> bool {
    while let Some((header, rest)) = answer.split_first_chunk::<HEADER_BYTES>() {
        let [kind, length @ ..] = header;
        let length = u32::from_be_bytes(*length).saturating_sub(4) as usize;
        let (Some(body), Some(behind)) = (rest.get(..length), rest.get(length..)) else { return false };
        match ServerMessage::parse(*kind, body) {
            Ok(ServerMessage::ErrorResponse(fields)) => {
                return fields.is_fatal() && fields.sqlstate() == Some(SqlState::ADMIN_SHUTDOWN);
            }
            _ if *kind == b'T' => answer = behind,
            _ => return false,
        }
    }
    false
}

/// Is this, behind what is said of statements without a word on rows, the error that a table has changed?
fn tells_of_a_change(mut answer: &[u8]) -> bool {
    while let Some((header, rest)) = answer.split_first_chunk::<HEADER_BYTES>() {
        let [kind, length @ ..] = header;
        let Some(body) = rest.get(..u32::from_be_bytes(*length).saturating_sub(4) as usize) else { break };
        match kind {
            // ParseComplete, BindComplete, CloseComplete, ParameterDescription.
            b'1' | b'2' | b'3' | b't' => answer = &rest[body.len()..],
            b'E' => {
                return matches!(
                    ServerMessage::parse(b'E', body),
                    Ok(ServerMessage::ErrorResponse(fields)) if fields.get(b'R') == Some(REVALIDATE)
                );
            }
            _ => break,
        }
    }
    false
}
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgherd_pgwire::message::build::{self, BindOut};
    use pgherd_pgwire::message::{Target, TransactionStatus};

    use super::*;
    use crate::session::{Loan, Mode};
    use crate::statements::{Known, Registry};

    fn bytes(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
        let mut out = BytesMut::new();
        write(&mut out);
        out.to_vec()
    }

    /// Two clients' sessions with the same server.
    struct Two {
        first: Session,
        second: Session,
        known: Option<Known>,
    }

    /// What went to the server, what the client heard, and whether it is to be asked anew.
    type Went = (Vec<u8>, Vec<u8>, bool);

    fn two() -> Two {
        let registry = Arc::new(Registry::default());
        let session = || Session::sharing(Mode::Transaction, Arc::clone(&registry));
        Two { first: session(), second: session(), known: Some(Known::new(10)) }
    }

    fn ask(session: &mut Session, known: &mut Option<Known>, asked: &[u8], answer: &[u8]) -> Went {
        assert!(session.is_one_query(asked));
        session.attach(Loan::new(known.take().unwrap(), 0));
        let mut retry = Retry::new(asked);
        assert!(retry.sends(), "that is what was asked first");
        let (mut sent, mut heard) = (BytesMut::new(), BytesMut::new());
        let passed = session.from_client(asked, &mut sent, &mut heard).unwrap();
        if let Pass::AsItCame(bytes) = passed.pass {
            sent.extend_from_slice(bytes);
        }
        assert!(heard.is_empty(), "a retry is for whoever has heard nothing");
        let (passed, is_heard) = retry.show(session, answer, &mut heard).unwrap();
        if let Pass::AsItCame(bytes) = passed.pass {
            heard.extend_from_slice(bytes);
        }
        assert_eq!(is_heard, !heard.is_empty());
        assert!(session.is_over());
        *known = session.detach().map(|loan| loan.known);
        if retry.is_outdated() {
            session.renew(retry.asked());
        }
        (sent.to_vec(), heard.to_vec(), retry.is_outdated())
    }

    fn ready() -> Vec<u8> {
        bytes(|to| build::ready_for_query(to, TransactionStatus::Idle))
    }

    /// As PostgreSQL reports it.
    fn changed() -> Vec<u8> {
        let fields =
            b"SERROR\0VERROR\0C0A000\0Mcached plan must not change result type\0RRevalidateCachedQuery\0\0";
        let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
        [&b"E"[..], &length, fields].concat()
    }

    fn parse(name: &[u8]) -> Vec<u8> {
        bytes(|to| build::parse(to, name, b"SELECT * FROM t", &[]).unwrap())
    }

    fn describe(name: &[u8]) -> Vec<u8> {
        bytes(|to| build::describe(to, Target::Statement, name).unwrap())
    }

    fn run(name: &[u8]) -> Vec<u8> {
        bytes(|to| {
            build::bind(to, &BindOut { statement: name, ..BindOut::default() }).unwrap();
            build::execute(to, b"", 0).unwrap();
        })
    }

    fn sync() -> Vec<u8> {
        bytes(build::sync)
    }

    const PARSED: &[u8] = b"1\0\0\0\x04";
    const NO_ROWS: &[u8] = b"t\0\0\0\x06\0\0n\0\0\0\x04";
    const RAN: &[u8] = b"2\0\0\0\x04C\0\0\0\rSELECT 0\0";

    #[test]
    fn who_knows_nothing_of_a_table_before_it_changed_hears_nothing_of_that() {
        let Two { mut first, mut second, mut known } = two();
        let asked = [parse(b"mine"), describe(b"mine"), sync()].concat();
        let answer = [PARSED, NO_ROWS, &ready()].concat();
        assert_eq!(ask(&mut first, &mut known, &asked, &answer).1, answer);

        // The other one prepares the same only now, and the server has it already.
        let asked = [parse(b"other"), describe(b"other"), sync()].concat();
        let answer = [changed(), ready()].concat();
        assert_eq!(ask(&mut second, &mut known, &asked, &answer).1, b"", "nothing is heard");
        let (sent, heard, _) = ask(&mut second, &mut known, &asked, &[PARSED, NO_ROWS, &ready()].concat());
        assert_eq!(sent, [parse(b"pgherd_2"), describe(b"pgherd_2"), sync()].concat());
        assert_eq!(heard, [PARSED, NO_ROWS, &ready()].concat());

        // The first one knows the old rows.
        let asked = [run(b"mine"), sync()].concat();
        let (_, heard, is_again) = ask(&mut first, &mut known, &asked, &answer);
        assert_eq!((heard, is_again), (answer, false));
    }

    #[test]
    fn what_was_only_parsed_is_new_until_it_is_used() {
        let Two { mut first, mut second, mut known } = two();
        let prepare = [parse(b"s"), sync()].concat();
        ask(&mut first, &mut known, &prepare, &[PARSED, &ready()].concat());
        // Answered here, so that the server says no more than this.
        ask(&mut second, &mut known, &prepare, &ready());
        let (asked, answer) = ([run(b"s"), sync()].concat(), [changed(), ready()].concat());
        assert!(ask(&mut second, &mut known, &asked, &answer).2);
        let fine = [PARSED, RAN, &ready()].concat();
        let (sent, heard, _) = ask(&mut second, &mut known, &asked, &fine);
        assert_eq!(sent, [parse(b"pgherd_2"), run(b"pgherd_2"), sync()].concat());
        assert_eq!(heard, [RAN, &ready()].concat(), "what the proxy prepares is its own business");
        let (_, heard, is_again) = ask(&mut second, &mut known, &asked, &answer);
        assert_eq!((heard, is_again), (answer, false), "it has run it");
    }

    #[test]
    fn a_servers_last_word_is_kept_until_nobody_else_can_be_asked() {
        let fatal = |sqlstate: &str| {
            let fields =
                format!("SFATAL\0VFATAL\0C{sqlstate}\0Mterminating connection\0RProcessInterrupts\0\0");
            let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
            [&b"E"[..], &length, fields.as_bytes()].concat()
        };
        let query = bytes(|to| build::query(to, b"SELECT 1").unwrap());
        let (columns, row) = (b"T\0\0\0\x06\0\0", b"D\0\0\0\x06\0\0");
        for (answer, kept) in [
            (fatal("57P01"), true),
            ([&columns[..], &fatal("57P01")].concat(), true),
            // Only the session's end is nothing of the answer.
            (fatal("53200"), false),
            ([&columns[..], &row[..], &fatal("57P01")].concat(), false),
        ] {
            let Two { mut first, mut known, .. } = two();
            first.attach(Loan::new(known.take().unwrap(), 0));
            let mut retry = Retry::new(&query);
            assert!(retry.sends());
            let (mut sent, mut heard) = (BytesMut::new(), BytesMut::new());
            first.from_client(&query, &mut sent, &mut heard).unwrap();
            let (passed, is_heard) = retry.show(&mut first, &answer, &mut heard).unwrap();
            let passed_on = match passed.pass {
                Pass::AsItCame(bytes) => bytes.to_vec(),
                Pass::Edited => heard.to_vec(),
            };
            assert!(first.server_leaves());
            assert_eq!((is_heard, retry.has_last_word()), (!kept, kept), "{}", answer.escape_ascii());
            let last_word = retry.take_last_word();
            assert_eq!(if kept { &last_word[..] } else { &passed_on[..] }, answer);
            assert!(passed_on.is_empty() == kept);
        }
    }

    #[test]
    fn nothing_else_is_asked_again() {
        let row = b"D\0\0\0\x0b\0\x01\0\0\0\x011";
        let error = String::from_utf8(changed()).unwrap();
        let other = error.replace("RevalidateCachedQuery", "RevalidateCachedQuerX").into_bytes();
        assert!(tells_of_a_change(&changed()) && tells_of_a_change(&[PARSED, &changed()].concat()));
        for answer in [&other[..], &[row, &changed()[..]].concat(), &changed()[..40], PARSED, b""] {
            assert!(!tells_of_a_change(answer), "{}", answer.escape_ascii());
        }
        let Two { first, .. } = two();
        let query = bytes(|to| build::query(to, b"SELECT 1").unwrap());
        assert!(first.is_one_query(&query) && first.is_one_query(&[run(b""), sync()].concat()));
        for more in
            [[&query[..], &query].concat(), run(b""), [sync(), sync()].concat(), [parse(b""), query].concat()]
        {
            assert!(!first.is_one_query(&more), "{}", more.escape_ascii());
        }
    }
}
