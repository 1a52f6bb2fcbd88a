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

/// A process on `host` that takes all CPU time that it gets.
fn busy(host: &Host) -> Process {
    let process = host.command("sh").args(["-c", "while :; do :; done"]).as_postgres().spawn();
    assert_runs(&process);
    process
}

fn assert_runs(process: &Process) {
    let before = process.cpu_ticks();
    wait_until(&format!("{process} to run"), A_WHILE, || match process.cpu_ticks() {
        now if now > before => Ok(()),
        now => Err(format!("{now:?} ticks of CPU time, as before")),
    });
}

fn assert_stands_still(processes: &[&Process]) {
    let ticks =
        || processes.iter().map(|process| process.cpu_ticks().expect("it is there")).collect::<Vec<_>>();
    let before = ticks();
    // sleep: time in which a process that runs would use some ticks.
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(ticks(), before);
}

#[test]
fn stopped_processes_stand_still_and_go_on() {
    let net = Net::new(&["a"]);
    let process = busy(net.host("a"));
    process.freeze();
    assert_stands_still(&[&process]);
    process.thaw();
    assert_runs(&process);
    process.kill();
    assert!(!process.is_alive() && net.host("a").processes().is_empty());
}

#[test]
#[should_panic(expected = "fault not injected")]
fn killing_what_is_dead_already_fails_the_test() {
    let net = Net::new(&["a"]);
    let process = busy(net.host("a"));
    process.kill();
    process.kill();
}

#[test]
fn a_frozen_host_stands_still_as_a_whole_while_the_others_run() {
    let net = Net::new(&["a", "b"]);
    let (one, two, elsewhere) = (busy(net.host("a")), busy(net.host("a")), busy(net.host("b")));
    let freezer = net.host("a").freeze();
    assert_stands_still(&[&one, &two]);
    assert_runs(&elsewhere);
    freezer.thaw();
    assert_runs(&one);
    assert_runs(&two);
}

#[test]
fn both_generations_of_cgroups_can_freeze() {
    let net = Net::new(&["a"]);
    let process = busy(net.host("a"));
    let name = format!("{}-frozen", net.dir().file_name().unwrap().to_str().unwrap());
    let mut tried = 0;
    for generation in [Generation::One, Generation::Two] {
        let Some(freezer) = Freezer::freeze_with(generation, &name, || net.host("a").processes()) else {
            continue;
        };
        tried += 1;
        assert_stands_still(&[&process]);
        freezer.thaw();
        assert_runs(&process);
    }
    assert!(tried > 0, "this machine has no freezer at all");
}

#[test]
fn a_starved_host_is_held_back_and_then_runs_again() {
    let net = Net::new(&["a"]);
    let process = busy(net.host("a"));
    let starvation = net.host("a").starve(5);
    wait_until("the kernel to hold it back", A_WHILE, || match starvation.throttled() {
        0 => Err("never throttled".to_owned()),
        _ => Ok(()),
    });
    drop(starvation);
    assert_runs(&process);
}

#[test]
fn a_host_is_starved_again_and_again_though_its_processes_have_children_all_the_time() {
    let net = Net::new(&["a"]);
    for _ in 0..3 {
        net.host("a").command("sh").args(["-c", "while :; do /bin/true; done"]).spawn();
    }
    for _ in 0..300 {
        // Fails if something of the time before is left.
        drop(net.host("a").starve(50));
    }
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
    // sleep: time for a retransmission, which must not come.
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
fn a_disk_fills_up_hangs_and_goes_on() {
    let net = Net::new(&["a"]);
    let a = net.host("a");
    let disk = Volume::disk(a, "disk", 32 << 20);
    let write = |file: &str| {
        let target = format!("of={}/{file}", disk.path().display());
        a.command("dd").args(["if=/dev/zero", &target, "bs=8k", "count=4", "conv=fsync"]).as_postgres()
    };
    write("before").run();
    disk.fill();
    assert!(String::from_utf8_lossy(&write("full").output().stderr).contains("No space left"));
    disk.free();
    disk.hang();
    let log = a.dir().join("dd.log");
    let writer = write("hanging").log_to(&log).spawn();
    // sleep: many times what the write takes on a healthy disk.
    std::thread::sleep(Duration::from_millis(200));
    assert!(writer.is_alive(), "a write to a hanging disk came back");
    disk.resume();
    writer.wait_gone(A_WHILE);
    assert!(disk.path().join("hanging").exists());
}

#[test]
fn a_disk_that_dies_forgets_what_was_not_synced_and_nothing_else() {
    let net = Net::new(&["a"]);
    let disk = Volume::disk(net.host("a"), "disk", 32 << 20);
    let (synced, unsynced) = (disk.path().join("synced"), disk.path().join("unsynced"));
    let mut file = std::fs::File::create(&synced).unwrap();
    file.write_all(b"kept").unwrap();
    file.sync_all().unwrap();
    std::fs::File::open(disk.path()).unwrap().sync_all().unwrap();
    std::fs::write(&unsynced, "lost").unwrap();
    drop(file);
    disk.die();
    disk.remount();
    assert_eq!(std::fs::read_to_string(&synced).unwrap(), "kept");
    assert!(!std::fs::read_to_string(&unsynced).is_ok_and(|text| text == "lost"), "it was never synced");
}

#[test]
fn what_a_killed_run_left_behind_is_removed_by_the_next() {
    // It lives until all is in place: whatever belongs to nobody is removed by any test that begins meanwhile.
    let mut owner = Command::new("sleep").arg("1000").spawn().unwrap();
    let name = format!("pgh{}x0", owner.id());
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
    owner.kill().unwrap();
    owner.wait().unwrap();

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
        busy(net.host("a"));
        let _frozen = net.host("a").freeze();
        panic!("as a failing test does");
    });
    assert!(panicked.is_err());
    let name = name.into_inner().unwrap();
    assert!(!std::env::temp_dir().join(&name).exists());
    assert!(!Path::new("/run/netns").join(format!("{name}-a")).exists());
}
