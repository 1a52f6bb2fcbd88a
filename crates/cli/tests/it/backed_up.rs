//! A herd's own repository: WAL from the first second, a first base backup by itself, and everything back from it alone.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::herd::{Herd, kill, wait_for};
use crate::repository::{program, said, story};
use crate::server::{Server, programs, sql};

/// On a quiet machine it is a second. Here it is what tells a stream of WAL from whole segments, which an hour of this load would not fill.
const LOSS_AT_MOST: Duration = Duration::from_secs(10);

/// In the database of the application.
pub(crate) fn of_app(server: &Server, statement: &str) -> String {
    let output = Command::new(programs().join("psql"))
        .args([
            "-h",
            "127.0.0.1",
            "-U",
            "postgres",
            "-XAtq",
            "-p",
            &server.port.to_string(),
            "-c",
            statement,
            "app",
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{statement}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(crate) fn backup(herd: &Herd) -> Result<Value, String> {
    Ok(herd.status()?["clusters"][0]["backup"].clone())
}

#[test]
fn as_root_a_herd_comes_back_from_its_repository_alone() {
    story("backed_up::as_root_a_herd_comes_back_from_its_repository_alone", || {
        let herd = Herd::new();
        herd.up();
        herd.wait_whole();
        let first = wait_for("something that can be restored", || {
            let backup = backup(&herd)?;
            if backup["recovery_window"].is_null() { Err(backup.to_string()) } else { Ok(backup) }
        });
        assert!(first["last"].is_string() && first["ended"]["failed"].is_null(), "{first}");

        // The owner is a standby, and when it has to lead, another one.
        let owner_beside = |herd: &Herd| {
            let primary = herd.primary()?;
            let backup = backup(herd)?;
            match backup["owner"].as_str() {
                Some(owner) if owner != primary && backup["trouble"].is_null() => Ok(owner.to_owned()),
                _ => Err(format!("{primary} leads: {backup}")),
            }
        };
        wait_for("a standby to own the archive", || owner_beside(&herd));
        herd.sql("create table kept (n int primary key, at timestamptz default clock_timestamp())").unwrap();
        herd.sql("insert into kept values (-1)").unwrap();
        let former = herd.primary().unwrap();
        kill(herd.postmaster(&former).unwrap(), Signal::KILL).unwrap();
        herd.sql("insert into kept values (-2)").unwrap();
        herd.wait_whole();
        wait_for("a standby of the new primary to own the archive", || owner_beside(&herd));

        // One that somebody asks for, in the middle of it all, is refused by nobody and refers to the first.
        let asked = herd.run(&["backup", "create"]);
        assert_ne!(first["last"], asked.trim());
        wait_for("the owner to have seen it", || {
            let backup = backup(&herd)?;
            if backup["last"] == asked.trim() { Ok(()) } else { Err(backup.to_string()) }
        });
        let listed = herd.run(&["backup", "list"]);
        assert!(
            listed.contains(asked.trim()) && listed.contains(first["last"].as_str().unwrap()),
            "{listed}"
        );
        herd.run(&["backup", "check"]);

        // Everything dies at one moment, under a writer who notes what was acknowledged.
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = std::thread::scope(|threads| {
            let writer = threads.spawn(|| {
                let mut acknowledged = Vec::new();
                for n in 1.. {
                    if stop.load(Ordering::Relaxed)
                        || herd.sql(&format!("insert into kept values ({n})")).is_err()
                    {
                        break;
                    }
                    acknowledged.push((n, Instant::now()));
                }
                acknowledged
            });
            // sleep: so long it writes, and the first of it is older than what may be lost.
            std::thread::sleep(LOSS_AT_MOST + Duration::from_secs(2));
            let repository = herd.dir.join("repository.toml.kept");
            std::fs::copy(herd.dir.join("a/repository.toml"), repository).unwrap();
            herd.kill_everything();
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap()
        });
        let died = acknowledged.last().unwrap().1;
        for node in ["a", "b", "c"] {
            std::fs::remove_dir_all(herd.dir.join(node)).unwrap();
        }

        let to = herd.dir.join("restored");
        let restored = program()
            .args(["restore", "--to", to.to_str().unwrap(), "--repository"])
            .arg(herd.dir.join("repository.toml.kept"))
            .output()
            .unwrap();
        assert!(restored.status.success(), "{}", said(&restored));
        // The herd's own lines want a password.
        std::fs::write(to.join("pg_hba.conf"), "host all all 127.0.0.1/32 trust\n").unwrap();
        let server = Server::over(to);
        crate::repository::wait("recovery ends", || sql(&server, "SELECT pg_is_in_recovery()") == "f");
        assert_eq!(
            of_app(&server, "SELECT count(*) FROM kept WHERE n < 0"),
            "2",
            "from before and after the failover"
        );
        let there: u64 = of_app(&server, "SELECT coalesce(max(n), 0) FROM kept").parse().unwrap();
        let whole = format!("SELECT count(*) FROM kept WHERE n BETWEEN 1 AND {there}");
        assert_eq!(of_app(&server, &whole), there.to_string(), "nothing is missing before the end");
        let lost: Vec<_> = acknowledged.iter().filter(|(n, _)| *n > there).collect();
        let loss = lost.first().map_or(Duration::ZERO, |(_, at)| died.duration_since(*at));
        eprintln!("{} of {} acknowledged rows lost, of the last {loss:?}", lost.len(), acknowledged.len());
        assert!(loss < LOSS_AT_MOST, "{} rows of the last {loss:?}", lost.len());
    });
}

#[test]
fn as_root_a_lost_disk_comes_back_from_the_repository() {
    story("backed_up::as_root_a_lost_disk_comes_back_from_the_repository", || {
        let herd = Herd::new();
        herd.up();
        herd.wait_whole();
        wait_for("something that can be restored", || {
            let backup = backup(&herd)?;
            if backup["recovery_window"].is_null() { Err(backup.to_string()) } else { Ok(()) }
        });
        herd.sql("create table kept as select n, repeat('x', 500) x from generate_series(1, 20000) n")
            .unwrap();
        herd.run(&["backup", "create"]);
        herd.sql("insert into kept values (-1)").unwrap();

        // The host of a standby comes back with an empty disk.
        let primary = herd.primary().unwrap();
        let victim = ["a", "b", "c"].into_iter().find(|node| *node != primary).unwrap();
        let agent = herd.agent(victim).unwrap();
        kill(agent, Signal::STOP).unwrap();
        kill(herd.postmaster(victim).unwrap(), Signal::KILL).unwrap();
        std::fs::remove_dir_all(herd.dir.join(victim).join("data")).unwrap();
        kill(agent, Signal::KILL).unwrap();
        let log = || std::fs::read_to_string(herd.dir.join(victim).join("log/agent.log")).unwrap();
        wait_for("its copy to be made from the repository", || {
            let log = log();
            if log.contains("made from the repository; the rest is streamed") { Ok(()) } else { Err(log) }
        });
        herd.wait_whole();

        // It is as good as any: it can lead, as soon as the rule by which it counts is proven.
        wait_for("it to be taken for a target", || {
            let output = herd.output(&["switchover", "--to", victim, "--yes"]);
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            match output.status.success() {
                true => Ok(()),
                false if told.contains("PGH-TARGET-NOT-ELECTABLE") => Err(told),
                false => panic!("{told}"),
            }
        });
        wait_for("it to lead", || match herd.primary()? {
            primary if primary == victim => Ok(()),
            other => Err(other),
        });
        assert_eq!(
            herd.sql("select count(*), min(n), sum(length(x)) from kept").unwrap(),
            "20001|-1|10000000"
        );
        herd.sql("insert into kept values (-2)").unwrap();
        herd.run(&["down", "--delete", "--yes"]);
    });
}
