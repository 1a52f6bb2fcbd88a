//! A scratch server is nobody's business but its owner's, and leaves nothing behind.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use pgherd_postgres::Installation;
use pgherd_postgres::scratch::{
    Checksums, Dump, How, Live, LiveError, Scratch, ScratchError, State, checksums, choose, remove_leftovers,
    transfer,
};

use crate::harness::{SOON, ask, installation, story, until};

fn how(roles: &[&str]) -> How {
    let roles = roles.iter().map(|role| (*role).to_owned()).collect();
    How { roles, preload: String::new(), flush: false, modest: true }
}

/// A cluster of its own in the place of a restored one.
async fn made(parent: &Path) -> (Scratch, Installation) {
    let installation = installation().await;
    let scratch = Scratch::make(&choose(parent).unwrap(), "a test").unwrap();
    let made = Command::new(installation.bin_dir.join("initdb"))
        .args(["--no-sync", "--data-checksums", "-A", "reject", "-U", "boss", "-D"])
        .arg(scratch.data_dir())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // What was set in the original by ALTER SYSTEM is still there.
    let auto = scratch.data_dir().join("postgresql.auto.conf");
    std::fs::write(
        auto,
        "listen_addresses = '*'\nshared_preload_libraries = 'nowhere'\narchive_mode = 'on'\n",
    )
    .unwrap();
    (scratch, installation)
}

async fn started(parent: &Path, roles: &[&str]) -> (Scratch, Installation, How) {
    let (mut scratch, installation) = made(parent).await;
    let how = how(roles);
    scratch.start(&installation, &how).await.unwrap();
    until("it runs", async || {
        matches!(scratch.state(&how).await, Ok(State::Primary) | Err(ScratchError::NoRole { .. }))
            .then_some(())
    })
    .await;
    (scratch, installation, how)
}

story! {
    async fn a_scratch_server_is_closed_to_others_and_gone_with_its_value() {
        let parent = tempfile::tempdir().unwrap();
        let (mut scratch, _, how) = started(parent.path(), &["postgres", "boss"]).await;
        assert_eq!(std::fs::metadata(scratch.dir()).unwrap().permissions().mode() & 0o777, 0o700);
        let session = scratch.connect("postgres", &how).await.unwrap();
        for (setting, value) in [
            ("listen_addresses", ""),
            ("shared_preload_libraries", ""),
            ("archive_mode", "off"),
            ("ssl", "off"),
            ("max_logical_replication_workers", "0"),
        ] {
            assert_eq!(ask(&session, &format!("SELECT current_setting('{setting}')")).await, value, "{setting}");
        }
        // Whoever runs it comes in as the roles that were named, and as no other.
        session.batch_execute("CREATE ROLE other LOGIN").await.unwrap();
        drop(session);
        let socket = scratch.dir().display().to_string();
        let psql = |role: &str| {
            let mut psql = Command::new("psql");
            psql.args(["-h", &socket, "-U", role, "-XAtc", "SELECT 1", "postgres"]).output().unwrap()
        };
        assert!(psql("boss").status.success());
        let refused = String::from_utf8(psql("other").stderr).unwrap();
        assert!(refused.to_lowercase().contains("peer authentication failed"), "{refused}");

        assert!(remove_leftovers(parent.path()).is_empty(), "somebody works with it");
        let dir = scratch.dir().to_owned();
        drop(scratch);
        assert!(!dir.exists() && std::fs::read_dir(parent.path()).unwrap().next().is_none());
        assert!(!psql("boss").status.success());
    }
}

story! {
    async fn what_keeps_a_scratch_server_from_being_used_is_told() {
        let parent = tempfile::tempdir().unwrap();
        let (mut scratch, installation, how) = started(parent.path(), &["nobody"]).await;
        let error = scratch.state(&how).await.unwrap_err();
        assert!(matches!(&error, ScratchError::NoRole { .. }) && error.hint().unwrap().contains("--superuser"), "{error}");
        scratch.end().await.unwrap();
        let wrong = How { preload: "no_such_library".to_owned(), ..how };
        scratch.start(&installation, &wrong).await.unwrap();
        until("it ends", async || matches!(scratch.state(&wrong).await, Ok(State::Ended)).then_some(())).await;
        let error = scratch.ended();
        assert!(error.to_string().contains("no_such_library"), "{error}");
        scratch.remove().await.unwrap();
        assert!(std::fs::read_dir(parent.path()).unwrap().next().is_none());
    }
}

story! {
    async fn a_page_that_is_damaged_is_found_when_the_server_has_stopped() {
        let parent = tempfile::tempdir().unwrap();
        let (mut scratch, installation, how) = started(parent.path(), &["boss"]).await;
        let session = scratch.connect("postgres", &how).await.unwrap();
        session.batch_execute("CREATE TABLE public.t AS SELECT generate_series(1, 1000) AS n").await.unwrap();
        let file = ask(&session, "SELECT pg_relation_filepath('public.t')").await;
        drop(session);
        scratch.stop(SOON).await.unwrap();
        let data = scratch.data_dir();
        assert!(matches!(checksums(&installation, &data).await.unwrap(), Checksums::Good { blocks, .. } if blocks > 100));
        let opened = std::fs::OpenOptions::new().write(true).open(data.join(file)).unwrap();
        opened.write_all_at(b"x", 8192 + 4000).unwrap();
        let Checksums::Bad { blocks: 1, told } = checksums(&installation, &data).await.unwrap() else { panic!() };
        assert!(told.iter().any(|line| line.contains("block 1")), "{told:?}");
    }
}

story! {
    async fn a_table_goes_over_as_a_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let (mut scratch, installation, how) = started(parent.path(), &["boss"]).await;
        let session = scratch.connect("postgres", &how).await.unwrap();
        session.batch_execute("CREATE DATABASE live").await.unwrap();
        for statement in [
            "CREATE TYPE public.color AS ENUM ('red')",
            "CREATE TABLE public.\"It's \"\"odd\"\"\" (n int PRIMARY KEY, t text)",
            "INSERT INTO public.\"It's \"\"odd\"\"\" SELECT n, repeat('x', 1000) FROM generate_series(1, 3000) n",
            "CREATE TABLE public.coloured (c public.color)",
        ] {
            session.batch_execute(statement).await.unwrap();
        }
        let live = Live { installation: installation.clone(), conninfo: scratch.conninfo("live") };
        let rows = live.ask("SELECT 'a', NULL UNION ALL SELECT 'b\nc', 'd' ORDER BY 1").await.unwrap();
        assert_eq!(rows, [["a", ""], ["b\nc", "d"]]);
        assert!(live.ask("SELECT 1 WHERE false").await.unwrap().is_empty());
        assert!(matches!(live.ask("SELECT nonsense").await, Err(LiveError::Refused { said }) if said.contains("nonsense")));

        let dump = |tables: &[&str]| Dump {
            conninfo: scratch.conninfo("postgres"),
            tables: tables.iter().map(|table| ("public".to_owned(), (*table).to_owned())).collect(),
            owners: true,
            grants: true,
            tablespaces: true,
        };
        // The second one lacks its type there, so that the first one does not come either.
        let both = dump(&["It's \"odd\"", "coloured"]);
        let error = transfer(&both, &installation, &live, |_| {}).await.unwrap_err();
        assert!(matches!(&error, LiveError::Load { said } if said.contains("public.color")), "{error}");
        let there = "SELECT count(*) FROM pg_catalog.pg_tables WHERE schemaname = 'public'";
        assert_eq!(live.ask(there).await.unwrap(), [["0"]]);
        let missing = transfer(&dump(&["nowhere"]), &installation, &live, |_| {}).await.unwrap_err();
        assert!(matches!(&missing, LiveError::Dump { said } if said.contains("no matching tables")), "{missing}");

        let mut seen = 0;
        let done = transfer(&dump(&["It's \"odd\""]), &installation, &live, |bytes| seen = bytes).await.unwrap();
        assert!(done.bytes > 3_000_000 && seen == done.bytes, "{done:?} {seen}");
        assert_eq!(live.ask("SELECT count(*) FROM public.\"It's \"\"odd\"\"\"").await.unwrap(), [["3000"]]);
    }
}
