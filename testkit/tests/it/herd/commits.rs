//! COMMITs that are lost with their primary, through a proxy that is asked to find out what became of them.

use std::net::SocketAddr;
use std::thread::JoinHandle;

use pgherd_testkit::{Answer, Cause, Session};

use super::*;

/// Rows that are committed at once, each by a client of its own.
const CLIENTS: i32 = 3;
/// The failover included.
const TOLD_WITHIN: Duration = Duration::from_secs(60);

/// Clients that have written a row each, in transactions that are open.
fn open(herd: &Herd, proxy: SocketAddr, first: i32) -> Vec<Session> {
    let rows = first..first + CLIENTS;
    rows.map(|row| {
        let mut session =
            Session::open(herd.net().client(), proxy, &herd.login()).expect("the proxy leads to it");
        session.run("BEGIN");
        session.run(&format!("INSERT INTO committed VALUES ({row})"));
        session
    })
    .collect()
}

/// All of them commit; returns when the server of each waits for standbys.
fn commit(herd: &Herd, primary: &str, sessions: Vec<Session>) -> Vec<JoinHandle<(Session, Answer)>> {
    let committing = sessions.into_iter().map(|mut session| {
        std::thread::spawn(move || {
            let answer = session.ask("COMMIT", TOLD_WITHIN);
            (session, answer)
        })
    });
    let committing = committing.collect();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query = 'COMMIT'";
    says(herd, primary, "every COMMIT to wait for standbys", waiting, &CLIENTS.to_string());
    committing
}

#[track_caller]
fn says(herd: &Herd, node: &str, what: &str, question: &str, expected: &str) {
    pgherd_testkit::wait_until(what, SOON, || {
        let rows = herd.ask_locally(node, question)?;
        if rows == [[Some(expected.to_owned())]] { Ok(()) } else { Err(format!("{rows:?}")) }
    });
}

fn told(committing: Vec<JoinHandle<(Session, Answer)>>) -> Vec<(Session, Answer)> {
    committing.into_iter().map(|client| client.join().expect("no panic")).collect()
}

#[test]
fn clients_of_a_proxy_that_checks_commits_hear_what_became_of_those_that_a_failover_took() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_proxy("commit_check = true").start();
    let (_process, proxy) = herd.start_proxy("front");
    let first = herd.primary();
    herd.session(&first).run("CREATE TABLE committed (number int)");
    let standbys = |primary: &str| {
        let others = ["a", "b", "c"].into_iter().filter(|node| *node != primary);
        others.collect::<Vec<_>>()
    };

    // No standby has heard of the commits, and the next primary has not got them.
    let sessions = open(&herd, proxy, 0);
    for standby in standbys(&first) {
        herd.net().cut_port(&first, standby, POSTGRES_PORT);
    }
    let committing = commit(&herd, &first, sessions);
    herd.kill_postmaster(&first);
    for (_, answer) in told(committing) {
        let (Answer::Refused(cause) | Answer::Unknown(cause)) = answer else {
            panic!("{answer:?} of what is gone")
        };
        assert_eq!(cause, Cause::Sqlstate("40001".to_owned()), "it is known to be rolled back");
    }
    herd.net().heal();
    herd.wait_until_whole(WHOLE);

    // Standbys have flushed them, and the old primary has not heard that any more.
    let second = herd.primary();
    assert_ne!(second, first);
    let sessions = open(&herd, proxy, CLIENTS);
    for standby in standbys(&second) {
        herd.net().cut_port_one_way(standby, &second, POSTGRES_PORT);
    }
    let committing = commit(&herd, &second, sessions);
    let written = herd.ask_locally(&second, "SELECT pg_current_wal_flush_lsn()").unwrap();
    let written = written[0][0].as_deref().expect("a position");
    for standby in standbys(&second) {
        let has_it = format!("SELECT pg_last_wal_receive_lsn() >= '{written}'");
        says(&herd, standby, "the standbys to have the commits", &has_it, "t");
    }
    herd.kill_postmaster(&second);
    for (mut session, answer) in told(committing) {
        assert_eq!(answer, Answer::Done(Vec::new()), "it is committed, and its client notices nothing");
        assert_eq!(session.value("SELECT 'stays'").as_deref(), Some("stays"));
    }
    herd.net().heal();
    herd.wait_until_whole(WHOLE);
    let rows = herd.session(&herd.primary()).run("SELECT number FROM committed ORDER BY 1");
    let rows: Vec<String> = rows.into_iter().flatten().flatten().collect();
    assert_eq!(rows, ["3", "4", "5"], "what clients were told is what is there");
}
