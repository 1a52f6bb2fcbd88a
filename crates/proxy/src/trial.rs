//! A read that another server can be asked for as well, until the client has heard anything of its answer.
//!
//! What the client asked is kept, and what the server answers is held back until its first message that counts: a row, the
//! end, an error. If that is an error by which a standby says that it is no primary, or that its replay was in the way, the
//! client hears nothing of it, and the primary is asked.
//!
//! Leaves out who is asked next. Hazard: an answer that is passed on in part, and then given once more.

use bytes::BytesMut;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::frame::HEADER_BYTES;
use pgherd_pgwire::message::ServerMessage;

use crate::session::{Fault, Pass, Session};

/// An answer of which so much came before its first row is passed on as it is.
const MAX_HELD_BYTES: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Trial {
    /// What the client has sent, as it came,
    asked: BytesMut,
    /// and what had come behind it, which no server sees before this is over.
    behind: BytesMut,
    held: BytesMut,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The client has heard nothing yet.
    Open,
    /// It hears all.
    Answered,
    /// It is to hear nothing of it. `for_good`: the statement will always be refused there.
    Refused { for_good: bool },
}

impl Trial {
    pub(crate) fn new(asked: &[u8], behind: BytesMut) -> Trial {
        Trial { asked: BytesMut::from(asked), behind, held: BytesMut::new(), outcome: Outcome::Open }
    }

    pub(crate) fn asked(&self) -> &[u8] {
        &self.asked
    }

    pub(crate) fn outcome(&self) -> Outcome {
        self.outcome
    }

    pub(crate) fn into_asked_and_behind(self) -> (BytesMut, BytesMut) {
        (self.asked, self.behind)
    }

    /// Shows the session what came from the server. How much of `chunk` was taken, and how much of its end before that is to
    /// be passed on as it is; `None`: what stands in `edited`.
    pub(crate) fn show(
        &mut self,
        session: &mut Session,
        chunk: &[u8],
        edited: &mut BytesMut,
    ) -> Result<(Option<usize>, usize), Fault> {
        if self.outcome == Outcome::Open {
            self.outcome = if self.held.is_empty() {
                judge(chunk)
            } else {
                self.held.extend_from_slice(chunk);
                judge(&self.held)
            };
            if self.outcome == Outcome::Open {
                if self.held.is_empty() {
                    self.held.extend_from_slice(chunk);
                }
                return Ok((Some(0), chunk.len()));
            }
        }
        let held = std::mem::take(&mut self.held);
        let all = if held.is_empty() { chunk } else { &held };
        let passed = session.from_server(all, edited)?;
        // What is left is the beginning of a header, and so from this chunk: the message that decided ended in it.
        let taken_bytes = chunk.len() - (all.len() - passed.taken_bytes);
        let as_it_came = match (passed.pass, self.outcome) {
            (_, Outcome::Refused { .. }) => {
                edited.clear();
                Some(0)
            }
            (Pass::AsItCame(bytes), _) if held.is_empty() => Some(bytes.len()),
            (Pass::AsItCame(bytes), _) => {
                edited.extend_from_slice(bytes);
                None
            }
            (Pass::Edited, _) => None,
        };
        Ok((as_it_came, taken_bytes))
    }
}

/// By what a server has answered so far, from the beginning.
fn judge(mut answer: &[u8]) -> Outcome {
    let begin = answer.len();
    while let Some((header, rest)) = answer.split_first_chunk::<HEADER_BYTES>() {
        let [kind, length @ ..] = header;
        let body_bytes = u32::from_be_bytes(*length).saturating_sub(4) as usize;
        match (kind, rest.get(..body_bytes)) {
            // Of the statement and its columns; or of something else.
            (b'1' | b'2' | b't' | b'T' | b'n' | b'S' | b'N', Some(_)) => answer = &rest[body_bytes..],
            (b'1' | b'2' | b't' | b'T' | b'n' | b'S' | b'N' | b'E', None) if begin < MAX_HELD_BYTES => break,
            (b'E', Some(body)) => return of_error(body),
            _ => return Outcome::Answered,
        }
    }
    if begin < MAX_HELD_BYTES { Outcome::Open } else { Outcome::Answered }
}

fn of_error(body: &[u8]) -> Outcome {
    let Ok(ServerMessage::ErrorResponse(fields)) = ServerMessage::parse(b'E', body) else {
        return Outcome::Answered;
    };
    let refused = |sqlstate: SqlState| match sqlstate.as_bytes() {
        // read_only_sql_transaction; feature_not_supported, as SERIALIZABLE; object_not_in_prerequisite_state, "recovery is in
        // progress".
        b"25006" | b"0A000" | b"55000" => Some(true),
        // serialization_failure: the replay was in the way (manual 27.4.2), of a transaction or of the whole session.
        b"40001" => Some(false),
        _ => None,
    };
    match fields.sqlstate().and_then(refused) {
        // The connection ends without an answer, and that is seen when it does.
        _ if fields.is_fatal() => Outcome::Open,
        Some(for_good) => Outcome::Refused { for_good },
        None => Outcome::Answered,
    }
}

#[cfg(test)]
mod tests {
    use pgherd_pgwire::message::build::{self, Report, Severity};

    use super::*;
    use crate::session::Mode;

    fn error(sqlstate: &[u8; 5], severity: Severity) -> BytesMut {
        let mut out = BytesMut::new();
        let sqlstate = SqlState::new(sqlstate).unwrap();
        build::error_response(
            &mut out,
            &Report { severity, sqlstate, message: "no", detail: None, hint: None },
        );
        out
    }

    fn answer(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    const COLUMNS: &[u8] = b"T\0\0\0\x1a\0\x01a\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0";
    const ROW: &[u8] = b"D\0\0\0\x0b\0\x01\0\0\0\x011";
    const DONE: &[u8] = b"C\0\0\0\rSELECT 1\0Z\0\0\0\x05I";

    /// Of a query, cut into pieces of this size: what the client hears, and how it went.
    fn heard(answer: &[u8], piece_bytes: usize) -> (Vec<u8>, Outcome) {
        let mut session = Session::sharing(Mode::Transaction, Default::default());
        session.attach(crate::session::Loan::new(crate::statements::Known::new(1), 0));
        let asked = b"Q\0\0\0\rSELECT 1\0";
        session.from_client(asked, &mut BytesMut::new(), &mut BytesMut::new()).unwrap();
        let (mut trial, mut heard, mut unread) = (Trial::new(asked, BytesMut::new()), Vec::new(), Vec::new());
        for piece in answer.chunks(piece_bytes) {
            unread.extend_from_slice(piece);
            let mut edited = BytesMut::new();
            let (as_it_came, taken_bytes) = trial.show(&mut session, &unread, &mut edited).unwrap();
            match as_it_came {
                Some(bytes) => heard.extend_from_slice(&unread[taken_bytes - bytes..taken_bytes]),
                None => heard.extend_from_slice(&edited),
            }
            unread.drain(..taken_bytes);
        }
        assert!(
            unread.is_empty()
                && (session.is_idle() || session.server_has_ended() || trial.outcome() == Outcome::Open)
        );
        assert_eq!(trial.asked(), asked);
        (heard, trial.outcome())
    }

    #[test]
    fn an_answer_is_heard_whole_or_not_at_all() {
        let refusal = answer(&[COLUMNS, &error(b"25006", Severity::Error), b"Z\0\0\0\x05I"]);
        let conflict = answer(&[&error(b"40001", Severity::Error), b"Z\0\0\0\x05I"]);
        let late = answer(&[COLUMNS, ROW, &error(b"40001", Severity::Error), b"Z\0\0\0\x05I"]);
        let wrong = answer(&[&error(b"42703", Severity::Error), b"Z\0\0\0\x05I"]);
        let rows = answer(&[COLUMNS, ROW, DONE]);
        for piece_bytes in 1..=rows.len() {
            let of = |answer: &[u8]| heard(answer, piece_bytes);
            assert_eq!(of(&refusal), (vec![], Outcome::Refused { for_good: true }));
            assert_eq!(of(&conflict), (vec![], Outcome::Refused { for_good: false }));
            assert_eq!(of(&late), (late.clone(), Outcome::Answered), "a row was delivered");
            assert_eq!(of(&wrong), (wrong.clone(), Outcome::Answered));
            assert_eq!(of(&rows), (rows.clone(), Outcome::Answered));
            assert_eq!(of(COLUMNS), (vec![], Outcome::Open));
            assert_eq!(of(&error(b"40001", Severity::Fatal)), (vec![], Outcome::Open));
        }
    }

    #[test]
    fn not_much_is_held() {
        let notice = answer(&[b"N\0\0\x10\x04", &[b'M'; 4095], b"\0"]);
        assert_eq!(judge(&notice.repeat(16)), Outcome::Answered);
        assert_eq!(judge(&notice.repeat(15)), Outcome::Open);
        assert_eq!(judge(b"N\x7f\xff\xff\xffM"), Outcome::Open);
    }
}
