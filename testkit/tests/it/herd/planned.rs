//! Changes that an operator asks for.

use std::net::SocketAddr;

use pgherd_testkit::Session;
use pgherd_testkit::connection::{Answer, Cause, Login};
use pgherd_testkit::handover::{self, Account, Clients};
use pgherd_testkit::herd::PROXY_READ_PORT;

use super::*;

#[test]
fn b10_a_planned_switchover_under_load_loses_nothing() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    let asked_at = Instant::now();
    herd.switch_over(Some("b"));
    assert_eq!(herd.primary(), "b");
    writes_go_on(&workload, asked_at, AT_ONCE);
    herd.wait_until_whole(WHOLE);
    let asked_at = Instant::now();
    herd.switch_over(None);
    assert_ne!(herd.primary(), "b");
    writes_go_on(&workload, asked_at, AT_ONCE);
    all_is_well(&herd, workload);
    herd.assert_quiet(&[JOINING]);
}

fn console(herd: &Herd, address: SocketAddr) -> Session {
    let login = Login { database: "pgbouncer".to_owned(), ..herd.login() };
    Session::open(herd.net().client(), address, &login).unwrap()
}

#[test]
fn clients_of_a_proxy_notice_no_switchover_and_hear_the_truth_of_a_failover() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).with_proxy("console_admins = [\"app\"]").start();
    let (_proxy, address) = herd.start_proxy("front");
    handover::create_table(&mut herd.session(&herd.primary()));
    let clients = Clients::start(herd.net().client(), address, herd.login(), 40, Some(200.0), 0);
    clients.wait_for_writes(WHOLE);
    // Those of the other port are on standbys, of which one becomes the primary and the primary one of them.
    let read_only = SocketAddr::new(address.ip(), PROXY_READ_PORT);
    let readers = Clients::reading(herd.net().client(), read_only, herd.login(), 20, 200.0);
    herd.switch_over(None);
    clients.wait_for_writes(WHOLE);
    herd.wait_until_whole(WHOLE);
    // Another one in the proxy's console.
    let mut console = console(&herd, address);
    let to = ["a", "b", "c"].into_iter().find(|node| *node != herd.primary()).expect("there are three");
    console.run(&format!("PROMOTE {to}"));
    assert_eq!(herd.primary(), to);
    clients.wait_for_writes(WHOLE);
    herd.wait_until_whole(WHOLE);
    // Whose transaction has no end is told that it is gone, and holds nobody up for longer than the others can wait.
    let mut endless = Session::open(herd.net().client(), address, &herd.login()).unwrap();
    endless.run("BEGIN");
    endless.run("CREATE TABLE undone (id int)");
    let runs = std::thread::spawn(move || endless.ask("SELECT pg_sleep(600)", WHOLE));
    herd.switch_over(None);
    let gone = Answer::Unknown(Cause::Sqlstate("40001".to_owned()));
    assert_eq!(runs.join().unwrap(), gone, "its connection has ended with it");
    clients.wait_for_writes(WHOLE);
    herd.wait_until_whole(WHOLE);
    assert_eq!(herd.session(&herd.primary()).value("SELECT to_regclass('undone')"), None);
    assert_eq!(handover::failures(&clients.ended()), Default::default(), "a switchover is a pause");
    let reads = readers.stop();
    assert_eq!(handover::failures(&reads), Default::default(), "and none for {} reads", reads.len());
    assert!(reads.len() > 100, "{} reads", reads.len());
    herd.kill_postmaster(&herd.primary());
    clients.wait_for_writes(WHOLE);
    let ended = clients.stop();
    herd.wait_until_whole(WHOLE);
    let honest = |sqlstate: &str| ["40001", "08007"].contains(&sqlstate);
    let failures = handover::failures(&ended);
    assert!(failures.keys().all(|(_, sqlstate)| honest(sqlstate)), "{failures:?}");
    let rows = handover::rows(&mut herd.session(&herd.primary()));
    let Account { acknowledged, lost, doubled, denied, .. } = handover::account(&ended, &rows);
    assert_eq!((lost, doubled, denied), (0, 0, 0), "of {acknowledged}");
}
