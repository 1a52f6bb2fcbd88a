//! Base backups: taken, restored, restored over what is there, read back.

use crate::Arguments;
use crate::measured::{Cache, Rounds, bytes_below, put_in_cache, run};
use crate::scene::{Scene, Server};
use crate::subjects::{FLOOR, PGBACKREST, Subject, Who};

/// Relations that one transaction makes: each of them holds a lock.
const RELATIONS_AT_ONCE: u32 = 5000;

pub(crate) fn measure(scene: &Scene, arguments: &Arguments) {
    let server = scene.data_set(arguments.scale);
    let subjects = Subject::all(scene, &server, arguments);
    let base = server.data_dir.join("base");
    println!("\nbase backups of {:.2} GB, {} rounds", bytes_below(&base) as f64 / 1e9, arguments.rounds);
    let mut rounds = Rounds::new(arguments.verbose);
    for _ in 0..arguments.rounds {
        for subject in &subjects {
            full_and_back(scene, &server, subject, &mut rounds);
        }
        // Into pgherd's repository, whose turn was last and is first now: it reads WAL of what has changed, and a real server's goes on.
        server.change(scene, arguments.seconds);
        server.sql(scene, "CHECKPOINT");
        for subject in subjects.iter().rev() {
            let Some(command) = subject.incremental() else { continue };
            subject.resume();
            scene.settle();
            let before = subject.stored_bytes();
            let mut taken = run("an incremental backup", command, Some(server.pid()));
            taken.stored_bytes = subject.stored_bytes() - before;
            rounds.add("incremental", subject.name(), taken);
        }
        server.archive(scene, "true");
        subjects.iter().for_each(Subject::remove);
    }
    rounds.report(PGBACKREST, FLOOR);
}

/// A full backup, and what can be done with it. Leaves the repository of who can go on with it.
fn full_and_back(scene: &Scene, server: &Server, subject: &Subject<'_>, rounds: &mut Rounds) {
    subject.prepare();
    scene.settle();
    let mut taken = run("a full backup", subject.full(), Some(server.pid()));
    taken.stored_bytes = subject.stored_bytes();
    rounds.add("full", subject.name(), taken);
    if subject.who != Who::Pgherd {
        server.archive(scene, "true");
    }
    let to = scene.path("restored");
    let wanted = bytes_below(&server.data_dir.join("base"));
    let modes = [("restore", None), ("delta", Some(Cache::Warm)), ("delta, cold", Some(Cache::Cold))];
    for (mode, over) in modes {
        let Some(command) = subject.restore(&to, over.is_some()) else { continue };
        scene.settle();
        if let Some(cache) = over {
            put_in_cache(&to, cache);
        }
        rounds.add(mode, subject.name(), run(mode, command, None));
        let there = bytes_below(&to.join("base"));
        // Statistics and maps of free space are written while it is copied.
        assert!(there.abs_diff(wanted) < wanted / 100, "{}: {there} bytes of {wanted}", subject.name());
    }
    scene.remove("restored");
    for (name, command) in subject.verify() {
        scene.settle();
        rounds.add("verify", name, run("verify", command, None));
    }
    if subject.incremental().is_none() {
        subject.remove();
    }
}

/// What a backup holds in memory where there are very many files.
pub(crate) fn measure_relations(scene: &Scene, arguments: &Arguments) {
    let name = "server-relations";
    scene.initdb(name);
    let making = ["fsync=off", "max_wal_size=4GB", "max_locks_per_transaction=2000"];
    let server = scene.start(name, &making);
    eprintln!("making {} relations", arguments.relations);
    let mut made = 0;
    while made < arguments.relations {
        let until = arguments.relations.min(made + RELATIONS_AT_ONCE);
        server.sql(
            scene,
            &format!(
                "DO $$BEGIN FOR n IN {}..{until} LOOP EXECUTE format('CREATE TABLE small_%s AS SELECT %s AS n', n, n); END LOOP; END$$",
                made + 1
            ),
        );
        made = until;
    }
    server.sql(scene, "CHECKPOINT");
    drop(server);
    let server = scene.start(name, &["archive_mode=on", "min_wal_size=80MB"]);
    server.archive(scene, "true");
    println!("\n{} small relations, one round", arguments.relations);
    let mut rounds = Rounds::new(arguments.verbose);
    for subject in Subject::all(scene, &server, arguments) {
        if subject.who == Who::PgBaseBackup || subject.who == Who::Barman {
            continue;
        }
        full_and_back(scene, &server, &subject, &mut rounds);
        if let Some(command) = subject.incremental() {
            subject.resume();
            scene.settle();
            rounds.add(
                "incremental",
                subject.name(),
                run("an incremental backup", command, Some(server.pid())),
            );
            server.archive(scene, "true");
        }
        subject.remove();
    }
    rounds.report(PGBACKREST, FLOOR);
    drop(server);
    scene.remove(name);
}
