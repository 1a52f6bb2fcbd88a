//! The flow: stories of both protocols, and every random interleaving against a server by the book.
//!
//! Leaves out bytes. In the stories a request is written as its type byte, and so is an answer; `e` is an
//! error.

use proptest::prelude::*;

use super::model::Model;
use super::*;

pub(crate) fn request(kind: u8) -> Request {
    match kind {
        // The two Describes, as letters that are no types of clients.
        b's' => Request::DescribeStatement,
        b'p' => Request::DescribePortal,
        kind => Request::of(kind, None).unwrap(),
    }
}

pub(crate) fn answer(kind: u8) -> Answer {
    match kind {
        b'e' => Answer::Error { fatal: false },
        b'!' => Answer::Error { fatal: true },
        b'Z' => Answer::Ready(TransactionStatus::Idle),
        b'z' => Answer::Ready(TransactionStatus::InTransaction),
        kind => Answer::of(kind, b"").unwrap(),
    }
}

fn flow() -> Flow {
    Flow::new(TransactionStatus::Idle)
}

/// `>` in front of what clients send, `<` in front of what servers do.
fn play(flow: &mut Flow, story: &str) -> Result<Option<Event>, Breach> {
    let (mut client, mut last) = (true, None);
    for byte in story.bytes() {
        match byte {
            b'>' => client = true,
            b'<' => client = false,
            b' ' => {}
            kind if client => drop(flow.request(request(kind), Origin::Client)?),
            kind => last = Some(flow.answer(answer(kind))?),
        }
    }
    Ok(last)
}

fn played(story: &str) -> Flow {
    let mut flow = flow();
    play(&mut flow, story).unwrap_or_else(|breach| panic!("{story}: {breach}"));
    flow
}

#[test]
fn what_the_proxy_answers_itself_waits_for_its_turn() {
    let mut flow = flow();
    let local = |flow: &mut Flow, request| match flow.request(request, Origin::Local).unwrap() {
        Accepted::Queued(ticket) => ticket,
        other => panic!("{other:?}"),
    };
    let taken = |flow: &mut Flow| flow.take_local().map(|owed| owed.ticket);
    let first = local(&mut flow, Request::Parse);
    assert_eq!((taken(&mut flow), taken(&mut flow)), (Some(first), None));
    play(&mut flow, ">BE").unwrap();
    let second = local(&mut flow, Request::Close);
    let third = local(&mut flow, Request::Parse);
    play(&mut flow, ">S").unwrap();
    assert_eq!(taken(&mut flow), None);
    play(&mut flow, "<2D").unwrap();
    assert_eq!(taken(&mut flow), None);
    play(&mut flow, "<C").unwrap();
    assert_eq!([taken(&mut flow), taken(&mut flow), taken(&mut flow)], [Some(second), Some(third), None]);
    assert!(!flow.is_clean());
    play(&mut flow, "<Z").unwrap();
    assert!(flow.is_clean());
    // Skipped like everything else behind an error.
    play(&mut flow, ">B").unwrap();
    local(&mut flow, Request::Parse);
    play(&mut flow, "<e").unwrap();
    assert!(flow.is_skipping() && taken(&mut flow).is_none());
    assert_eq!(flow.request(Request::Parse, Origin::Local), Ok(Accepted::Skipped));
    play(&mut flow, ">S<Z").unwrap();
    assert!(flow.is_clean() && !flow.is_skipping());
}

#[test]
fn after_these_the_connection_is_clean() {
    for story in [
        "",
        ">Q <TDDCZ",
        ">Q <IZ",
        ">Q <CCTDCZ",
        ">Q <TDeZ",
        ">Q <TDTDCZ",
        ">QQ <CZCZ",
        ">PBpES <12TDDCZ",
        ">PBpES <12nCZ",
        ">PsS <1tTZ",
        ">PBEH <12DDs >EH <DC >S <Z",
        // An error in the middle: the rest is skipped up to Sync, also what comes later, also a Query.
        ">PBE <1e >PQF S <Z",
        ">PBESPBES <e Z12CZ",
        ">PBES PBES Q <12CZ 1e Z CZ",
        // A Query inside a batch ends it.
        ">PBEQ <12CCZ",
        // The commit at a Sync may fail.
        ">PBES <12CeZ",
        ">F <VZ",
        ">F <eZ",
        ">F <VeZ",
        ">S <Z",
        ">H",
        ">cfd",
        // COPY to the client.
        ">Q <HddcCZ",
        ">Q <HdeZ",
        ">PBES <12HddcCZ",
        // COPY from the client, with and without waiting for the server to ask.
        ">Q <G >ddc <CZ",
        ">Qddc <GCZ",
        ">Q <G >dSHdSc <CZ",
        ">Qddc <eZ",
        ">Q <G >d <e >dc <Z",
        ">Q <G >d <eZ >dc",
        ">Q <G >df <eZ",
        ">Qdcdc Qdc <eZ GCZ",
        // In a batch a Sync before the end of the data is ignored, the one behind it is answered.
        ">PBES <12G >dc <C >S <Z",
        ">PBE <12G >ddcS <CZ",
        ">PBES <12e Z >dcS <Z",
        ">PBE <12G >df <e >S <Z",
        ">PBE <12G >d <e >dcS <Z",
        // Streaming replication, ended by either side.
        ">Q <WddS >d <dN >c <dcCZ",
        ">Q <Wdc >dc <TDCCZ",
        ">Q <We >c <Z",
        // What may come at any time.
        "<SNA >Q <STNDSACSZ",
    ] {
        assert!(played(story).is_clean(), "{story}");
    }
}

#[test]
fn after_these_it_is_not_clean() {
    for story in [
        ">Q",
        ">Q <C",
        ">Q <e",
        ">QQ <CZ",
        ">P",
        // Answered, but the implicit transaction is open (manual 55.2.3).
        ">PBEH <12C",
        ">PBE <e",
        ">PBESS <12CZ",
        ">Q <Cz",
        ">Q <G",
        ">Q <G >dc",
        ">PBES <12G >dc <C",
        ">Q <W",
        ">X",
        "<!",
        ">Q <CZ!",
    ] {
        assert!(!played(story).is_clean(), "{story}");
    }
}

/// A hostile server must not shift answers from one request, or one client, to another.
#[test]
fn what_the_server_must_not_send_breaks_the_connection_for_ever() {
    for story in [
        "<Z",
        "<e",
        "<C",
        "<D",
        ">Q <Z",
        ">Q <D",
        ">Q <CD",
        ">Q <CZZ",
        ">Q <eC",
        ">Q <ee",
        ">Q <1",
        ">Q <TG",
        ">Q <HC",
        ">Q <GC",
        ">Q <G >f <C",
        ">Q <Gd",
        ">Q <G >Qc <C",
        ">P <2",
        ">P <Z",
        ">PS <Z",
        ">PBES <12CC",
        ">PBES <12TD",
        ">PS <eeeZ",
        ">PBE <e1",
        ">PBE <eZ",
        ">sS <T",
        ">H <Z",
        ">F <C",
        ">F <Z",
        ">Q <WdcD",
        ">Q <W >c <cd",
        "<!Z",
        "<!!",
    ] {
        let mut broken = flow();
        assert!(play(&mut broken, story).is_err(), "{story}");
        assert!(!broken.is_clean(), "{story}");
        assert_eq!(broken.answer(Answer::Asynchronous), Err(Breach::Broken), "{story}");
        assert!(broken.request(Request::Query, Origin::Client).is_err(), "{story}");
    }
}

#[test]
fn a_copy_that_failed_after_a_sync_went_into_it_leaves_a_doubt() {
    for story in [">PBES <12G >d <e", ">Q <G >SdcQ <e", ">PBE <12G >SdfS <e"] {
        let mut doubtful = played(story);
        assert!(doubtful.in_doubt(), "{story}");
        // Either number of ReadyForQuery may come, and neither makes it clean.
        for _ in 0..2 {
            assert_eq!(doubtful.answer(answer(b'Z')), Ok(Event::Doubtful));
            assert!(!doubtful.is_clean());
        }
    }
    assert!(!played(">PBES <12G >dc <C >S <Z").in_doubt());
}

#[test]
fn answers_name_the_request_and_who_made_it() {
    let mut flow = flow();
    assert_eq!(flow.request(Request::Parse, Origin::Proxy), Ok(Accepted::Queued(0)));
    assert_eq!(flow.request(Request::Bind, Origin::Client), Ok(Accepted::Queued(1)));
    assert_eq!(flow.request(Request::Flush, Origin::Client), Ok(Accepted::Silent));
    let parse = Owed { ticket: 0, request: Request::Parse, origin: Origin::Proxy };
    assert_eq!(flow.answer(Answer::ParseComplete), Ok(Event::Done(parse)));
    let bind = Owed { ticket: 1, request: Request::Bind, origin: Origin::Client };
    assert_eq!(flow.answer(answer(b'e')), Ok(Event::Failed(bind)));
    assert_eq!(flow.request(Request::Execute, Origin::Client), Ok(Accepted::Skipped));
    assert_eq!(flow.request(Request::Sync, Origin::Client), Ok(Accepted::Queued(2)));
    let sync = Owed { ticket: 2, request: Request::Sync, origin: Origin::Client };
    let failed = TransactionStatus::Failed;
    assert_eq!(flow.answer(Answer::Ready(failed)), Ok(Event::Ready(sync, failed)));
    assert_eq!((flow.status(), flow.outstanding()), (failed, 0));
    assert_eq!(flow.answer(answer(b'!')), Ok(Event::Closing));
    assert_eq!(flow.request(Request::Query, Origin::Client), Ok(Accepted::Lost));
}

#[test]
fn nothing_follows_terminate() {
    let mut flow = played(">QX <CZ");
    assert_eq!(
        flow.request(Request::Query, Origin::Client),
        Err(Breach::AfterTerminate { request: Request::Query })
    );
}

#[test]
fn memory_is_bounded_and_given_back() {
    let mut flow = flow();
    for _ in 0..MAX_OUTSTANDING {
        flow.request(Request::Sync, Origin::Client).unwrap();
    }
    assert!(!flow.has_room());
    assert_eq!(flow.request(Request::Sync, Origin::Client), Err(Breach::TooMany));
    for _ in 0..MAX_OUTSTANDING {
        flow.answer(answer(b'Z')).unwrap();
    }
    assert!(flow.is_clean());
    assert!(flow.queue.capacity() <= KEPT_OUTSTANDING);
    // What the server ignores takes no room.
    play(&mut flow, ">P <e").unwrap();
    for _ in 0..=MAX_OUTSTANDING {
        flow.request(Request::Query, Origin::Client).unwrap();
    }
    assert_eq!(flow.outstanding(), 0);
}

#[test]
fn types_and_contents_become_requests_and_answers() {
    assert_eq!(Request::of(b'D', Some(b'S')), Ok(Request::DescribeStatement));
    assert_eq!(Request::of(b'D', Some(b'P')), Ok(Request::DescribePortal));
    assert!(Request::of(b'D', Some(b'x')).is_err());
    assert!(Request::of(b'D', None).is_err());
    assert!(Request::of(b'p', None).is_err());
    assert_eq!(Answer::of(b'E', b"SFATAL\0\0"), Ok(Answer::Error { fatal: true }));
    assert_eq!(Answer::of(b'Z', b"T"), Ok(Answer::Ready(TransactionStatus::InTransaction)));
    assert!(Answer::of(b'Z', b"X").is_err());
    assert!(Answer::of(b'R', b"\0\0\0\0").is_err(), "no authentication in a session");
}

pub(crate) const REQUESTS: &[u8] = b"QQQPBspEEEECSSSHFdccfX";
pub(crate) const ANSWERS: &[u8] = b"123tTnDCIsGHWdcVZe!N";

/// Plays random requests and answers to both, the answers mostly legal ones, and compares after each.
fn compare(steps: &[(u8, u8)]) -> Result<(), TestCaseError> {
    let (mut flow, mut model) = (flow(), Model::new());
    let mut story = String::new();
    for (what, which) in steps {
        let pick = |from: &[u8]| from[usize::from(*which) % from.len()];
        if what % 5 < 2 {
            let kind = pick(REQUESTS);
            // One Terminate in a while is enough: nothing follows it.
            if kind == b'X' && what % 3 > 0 {
                continue;
            }
            story.extend(['>', char::from(kind)]);
            if flow.request(request(kind), Origin::Client).is_ok() {
                model.send(request(kind));
            }
        } else {
            let legal: Vec<u8> = ANSWERS
                .iter()
                .copied()
                .filter(|kind| *kind != b'!' && model.could_say(answer(*kind)))
                .collect();
            let kind = if what % 20 == 19 || legal.is_empty() { pick(ANSWERS) } else { pick(&legal) };
            story.extend(['<', char::from(kind)]);
            let possible = model.says(answer(kind));
            let accepted = flow.answer(answer(kind));
            if flow.in_doubt() {
                if !possible {
                    prop_assert!(!flow.is_clean(), "clean in doubt: {}", story);
                    return Ok(());
                }
            } else {
                prop_assert_eq!(accepted.is_ok(), possible, "{}: {:?}", story, accepted);
            }
            if accepted.is_err() {
                prop_assert!(!flow.is_clean(), "clean after a breach: {}", story);
                return Ok(());
            }
        }
        if let Some(kind) = flow.repeatable() {
            let mut again = flow.clone();
            prop_assert!(again.answer(answer(kind)).is_ok() && again == flow, "not repeatable: {}", story);
        }
        if flow.is_copying_in() {
            let mut again = flow.clone();
            let taken = again.request(Request::CopyData, Origin::Client) == Ok(Accepted::InCopy);
            prop_assert!(taken && again == flow, "takes no data: {}", story);
        }
        let clean = flow.is_clean();
        prop_assert!(!(clean && model.may_be_busy()), "taken for clean too early: {}", story);
        prop_assert!(clean || model.may_be_busy() || flow.in_doubt(), "never clean again: {}", story);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn every_interleaving_is_judged_as_by_a_server_by_the_book(
        steps in prop::collection::vec((any::<u8>(), any::<u8>()), 1..50),
    ) {
        compare(&steps)?;
    }
}
