//! What happens to the processes of a host.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pgherd_testkit::cgroup::{Freezer, Generation};
use pgherd_testkit::process::Process;
use pgherd_testkit::volume::Volume;
use pgherd_testkit::{Host, Net, wait_until};

const A_WHILE: Duration = Duration::from_secs(10);

/// A shell on `host` that counts into a file without end.
fn counter(host: &Host, name: &str) -> (Process, impl Fn() -> u64) {
    let file = host.dir().join(name);
    let script = format!("n=0; while :; do n=$((n+1)); echo $n > {}; done", file.display());
    let process = host.command("sh").args(["-c", &script]).as_postgres().spawn();
    let count = move || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    };
    wait_until("the counter to count", A_WHILE, || if count() > 10 { Ok(()) } else { Err("not yet".into()) });
    (process, count)
}

/// Whether a counter moves within a tenth of a second. A read may meet the moment between truncation and
/// writing, so what counts is that two readings differ, both of them real.
fn counts(count: &impl Fn() -> u64) -> bool {
    let reading =
        || wait_until("a reading", A_WHILE, || Some(count()).filter(|n| *n > 0).ok_or("0".to_owned()));
    let before = reading();
    std::thread::sleep(Duration::from_millis(100));
    reading() != before
}

#[test]
fn stopped_processes_stand_still_and_go_on() {
    let net = Net::new(&["a"]);
    let (process, count) = counter(net.host("a"), "count");
    process.freeze();
    // A process stopped between truncation and writing leaves an empty file: no reading, no progress.
    let frozen_at = count();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(count(), frozen_at);
    process.thaw();
    assert!(counts(&count));
    process.kill();
    assert!(!process.is_alive() && net.host("a").processes().is_empty());
}

#[test]
#[should_panic(expected = "fault not injected")]
fn killing_what_is_dead_already_fails_the_test() {
    let net = Net::new(&["a"]);
    let (process, _) = counter(net.host("a"), "count");
    process.kill();
    process.kill();
}

#[test]
fn a_frozen_host_stands_still_as_a_whole_while_the_others_run() {
    let net = Net::new(&["a", "b"]);
    let (a, b) = (net.host("a"), net.host("b"));
    let counters = [counter(a, "one").1, counter(a, "two").1];
    let elsewhere = counter(b, "three").1;
    let freezer = a.freeze();
    let before = counters.each_ref().map(|count| count());
    assert!(counts(&elsewhere));
    assert_eq!(counters.each_ref().map(|count| count()), before);
    freezer.thaw();
    assert!(counters.iter().all(counts));
}

#[test]
fn both_generations_of_cgroups_can_freeze() {
    let net = Net::new(&["a"]);
    let (process, count) = counter(net.host("a"), "count");
    let name = format!("{}-frozen", net.dir().file_name().unwrap().to_str().unwrap());
    let mut tried = 0;
    for generation in [Generation::One, Generation::Two] {
        let Some(freezer) = Freezer::freeze_with(generation, &name, || net.host("a").processes()) else {
            continue;
        };
        tried += 1;
        let before = count();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(count(), before, "{generation:?}");
        freezer.thaw();
        assert!(counts(&count), "{generation:?}");
    }
    assert!(tried > 0, "this machine has no freezer at all");
    process.kill();
}

#[test]
fn a_starved_host_is_held_back_and_then_runs_again() {
    let net = Net::new(&["a"]);
    let (_, count) = counter(net.host("a"), "count");
    let starvation = net.host("a").starve(5);
    wait_until("the kernel to hold it back", A_WHILE, || match starvation.throttled() {
        0 => Err("never throttled".to_owned()),
        _ => Ok(()),
    });
    drop(starvation);
    assert!(counts(&count));
}

#[test]
fn a_crashed_host_says_no_goodbye_and_is_silent_until_the_power_is_back() {
    let net = Net::new(&["a"]);
    let a = net.host("a");
    // A child on `a` holds the connection: its death would send a FIN.
    let listener = net.client().enter(|| TcpListener::bind((net.client().address(), 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let script = format!("exec 3<>/dev/tcp/{}/{}; sleep 1000", address.ip(), address.port());
    a.command("bash").args(["-c", &script]).spawn();
    let (connection, _) = listener.accept().unwrap();
    connection.set_nonblocking(true).unwrap();
    net.crash("a");
    assert!(a.processes().is_empty());
    let state = |connection: &TcpStream| connection.peek(&mut [0]).map_err(|error| error.kind());
    let probe = || net.client().enter(|| TcpStream::connect_timeout(&(a.address(), 1).into(), A_WHILE / 20));
    assert_eq!(probe().unwrap_err().kind(), ErrorKind::TimedOut);
    net.power_on("a");
    assert_eq!(probe().unwrap_err().kind(), ErrorKind::ConnectionRefused);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(state(&connection), Err(ErrorKind::WouldBlock), "a dead process said goodbye after all");
    // Who talks to the rebooted host learns that it knows nothing of the connection.
    (&connection).write_all(b"x").unwrap();
    wait_until("the reset", A_WHILE, || match state(&connection) {
        Err(ErrorKind::ConnectionReset) => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

#[test]
fn a_volume_fills_up_for_its_user_and_can_be_freed() {
    let net = Net::new(&["a"]);
    let a = net.host("a");
    let volume = Volume::tmpfs(a, "wal", 4 << 20);
    let write = |file: &str| {
        let target = format!("of={}/{file}", volume.path().display());
        a.command("dd").args(["if=/dev/zero", &target, "bs=8k", "count=4"]).as_postgres().output()
    };
    assert!(write("before").status.success());
    volume.fill();
    let refused = write("full");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("No space left"), "{refused:?}");
    volume.free();
    assert!(write("after").status.success());
}

#[test]
fn what_a_killed_run_left_behind_is_removed_by_the_next() {
    let dead = {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    };
    let name = format!("pgh{dead}x0");
    let (namespace, directory) = (format!("{name}-a"), std::env::temp_dir().join(&name));
    let run = |program: &str, arguments: &[&str]| {
        assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
    };
    run("ip", &["netns", "add", &namespace]);
    std::fs::create_dir_all(directory.join("a/wal")).unwrap();
    run("mount", &["-t", "tmpfs", "leftover", directory.join("a/wal").to_str().unwrap()]);
    let mut child = Command::new("ip").args(["netns", "exec", &namespace, "sleep", "1000"]).spawn().unwrap();
    let process = Process::by_pid(child.id().cast_signed()).unwrap();
    wait_until("sleep to run", A_WHILE, || match process.command_line().first().map(String::as_str) {
        Some("sleep") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let freezer =
        Freezer::freeze_with(Generation::One, &format!("{namespace}-frozen"), || vec![process.clone()])
            .or_else(|| {
                Freezer::freeze_with(Generation::Two, &format!("{namespace}-frozen"), || {
                    vec![process.clone()]
                })
            });
    // A killed run drops nothing.
    std::mem::forget(freezer);

    drop(Net::new(&["a"]));
    child.wait().unwrap();
    assert!(!process.is_alive() && !directory.exists());
    assert!(!Path::new("/run/netns").join(&namespace).exists());
}

#[test]
fn a_network_is_gone_after_a_panic() {
    let name = std::sync::Mutex::new(String::new());
    let panicked = std::panic::catch_unwind(|| {
        let net = Net::new(&["a"]);
        *name.lock().unwrap() = net.dir().file_name().unwrap().to_str().unwrap().to_owned();
        let _counter = counter(net.host("a"), "count");
        let _frozen = net.host("a").freeze();
        panic!("as a failing test does");
    });
    assert!(panicked.is_err());
    let name = name.into_inner().unwrap();
    assert!(!std::env::temp_dir().join(&name).exists());
    assert!(!Path::new("/run/netns").join(format!("{name}-a")).exists());
}
