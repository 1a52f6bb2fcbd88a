//! A backup that has read only what WAL names is the same, page by page, as one that has read everything.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;

use pgherd_agent::backups::Progress;
use pgherd_agent::backups::take::{Find, Order, Taken, take};
use pgherd_backup::changed::MainFile;
use pgherd_backup::document::ReadError;
use pgherd_backup::manifest::{Changes, FoundBy, Manifest};
use pgherd_backup::map::Kind;
use pgherd_backup::name::BackupId;
use pgherd_core::types::{Lsn, Timeline};
use pgherd_postgres::base_backup::reading::page_lsn;
use pgherd_postgres::conf::SyncNames;
use pgherd_postgres::process::StopMode;
use pgherd_postgres::promote::{self, promote};
use pgherd_postgres::rewind::{RewindOrder, Rewound, rewind};
use pgherd_postgres::{follow, roles, slots};
use tokio::sync::watch;

use crate::harness::{SOON, ask, settings, start, story, superuser, until, upstream};
use crate::incremental::{checksums, control, start_as_primary};
use crate::original::{Original, digest, order, run};
use crate::restored::{Copy, at};

const PAGE: usize = 8192;

/// What changes files in every way that there is, one statement after the other.
const EVERYTHING: &str = "\
    DELETE FROM cut WHERE n > 1000; VACUUM cut;\
    INSERT INTO cut SELECT n, repeat('c', 100) FROM generate_series(2000, 5000) n;\
    VACUUM FULL whole; UPDATE whole SET x = repeat('w', 90) WHERE n % 50 = 0; REINDEX TABLE whole; CLUSTER whole USING whole_n;\
    CREATE TABLE IF NOT EXISTS made (n int PRIMARY KEY, t text); DROP TABLE made;\
    CREATE TABLE made (n int PRIMARY KEY, t text); INSERT INTO made SELECT n, repeat('m', 300) FROM generate_series(1, 3000) n;\
    TRUNCATE emptied; INSERT INTO emptied SELECT n FROM generate_series(1, 3000) n;\
    TRUNCATE undone; INSERT INTO undone SELECT n FROM generate_series(1, 20) n; VACUUM undone;\
    INSERT INTO indexed SELECT n, md5(n::text), point(n, n), ARRAY[n, n + 1] FROM generate_series(1, 2000) n;\
    DELETE FROM indexed WHERE n % 3 = 0; VACUUM indexed;\
    DROP INDEX IF EXISTS late; CREATE INDEX late ON indexed (md5);\
    INSERT INTO moving SELECT n FROM generate_series(1, 500) n;\
    INSERT INTO unlogged SELECT n FROM generate_series(1, 1000) n; INSERT INTO logged SELECT n FROM generate_series(1, 1000) n;\
    ALTER TABLE logged SET UNLOGGED; ALTER TABLE logged SET LOGGED;\
    SELECT nextval('counted') FROM generate_series(1, 40); SELECT nextval('seldom'); SELECT setval('reset', 7);\
    DROP DATABASE IF EXISTS copied; CREATE DATABASE copied TEMPLATE model STRATEGY file_copy;\
    DROP DATABASE IF EXISTS logged_copy; CREATE DATABASE logged_copy TEMPLATE model STRATEGY wal_log;\
    SELECT count(*) FROM whole; SELECT count(*) FROM cut; UPDATE hinted SET n = n + 1 WHERE n < 100";

/// Where there is a second tablespace.
const ELSEWHERE: &str = "\
    ALTER TABLE moving SET TABLESPACE inside; INSERT INTO moving SELECT n FROM generate_series(1, 1000) n;\
    ALTER TABLE moving SET TABLESPACE pg_default; INSERT INTO there SELECT n FROM generate_series(1, 500) n;\
    ALTER DATABASE wanders SET TABLESPACE inside; ALTER DATABASE wanders SET TABLESPACE pg_default";

/// What ends with a transaction that is taken back or is prepared, each in a transaction of its own.
const TOGETHER: [&str; 3] = [
    "BEGIN; TRUNCATE undone; INSERT INTO undone SELECT 1; CREATE TABLE never AS SELECT 1; ROLLBACK",
    "BEGIN; SAVEPOINT one; CREATE TABLE inner_one AS SELECT n FROM generate_series(1, 999) n; ROLLBACK TO one; COMMIT",
    "BEGIN; INSERT INTO undone SELECT n FROM generate_series(1, 2000) n; ROLLBACK",
];

const TABLES: &str = "\
    CREATE TABLE cut AS SELECT n, repeat('x', 100) AS x FROM generate_series(1, 30000) n;\
    CREATE TABLE whole AS SELECT n, repeat('x', 100) AS x FROM generate_series(1, 20000) n; CREATE INDEX whole_n ON whole (n);\
    CREATE TABLE emptied (n int); CREATE TABLE undone (n int); CREATE TABLE moving (n int); CREATE TABLE logged (n int);\
    CREATE SEQUENCE counted; CREATE SEQUENCE seldom; CREATE SEQUENCE reset; CREATE SEQUENCE cached CACHE 10;\
    CREATE UNLOGGED TABLE unlogged (n int);\
    CREATE TABLE indexed (n int, md5 text, p point, a int[]);\
    CREATE INDEX ON indexed USING hash (md5); CREATE INDEX ON indexed USING gist (p);\
    CREATE INDEX ON indexed USING spgist (p); CREATE INDEX ON indexed USING gin (a); CREATE INDEX ON indexed USING brin (n);\
    CREATE TABLE hinted AS SELECT n FROM generate_series(1, 20000) n;\
    CREATE TABLE untouched AS SELECT n, repeat('u', 200) AS x FROM generate_series(1, 100000) n; VACUUM untouched;\
    CREATE DATABASE model; CREATE DATABASE wanders";

/// A cluster with everything in it.
async fn furnished(standbys: &[&str]) -> Original {
    let original = furnished_in_one_place(standbys).await;
    for node in &original.nodes {
        run(
            &node.session().await,
            "ALTER SYSTEM SET allow_in_place_tablespaces = on; SELECT pg_reload_conf()",
        )
        .await
        .unwrap();
    }
    original.run("SET allow_in_place_tablespaces = on; CREATE TABLESPACE inside LOCATION ''").await;
    original.run("CREATE TABLE there (n int) TABLESPACE inside").await;
    original
}

/// Without a tablespace, which `pg_rewind` does not go over where it was made in place.
async fn furnished_in_one_place(standbys: &[&str]) -> Original {
    let original = Original::new(standbys).await;
    original.run("ALTER SYSTEM SET autovacuum = off; SELECT pg_reload_conf()").await;
    original.pgbench(&["-i", "-s", "5", "-q"]).await;
    original.run(TABLES).await;
    original
}

async fn everything(original: &Original) {
    let session = original.session().await;
    for statements in TOGETHER {
        session.batch_execute(statements).await.unwrap();
    }
    original.run(EVERYTHING).await;
    if ask(&session, "SELECT count(*) FROM pg_tablespace").await == "3" {
        original.run(ELSEWHERE).await;
    }
}

fn by(find: Find, parent: BackupId) -> Order {
    Order { find, ..order(Some(parent)) }
}

/// How a backup says that it was made.
fn changes(taken: &Taken) -> Changes {
    taken.manifest.changes.clone().unwrap()
}

/// Takes a backup of a node, which the first one may stream to.
async fn take_of(original: &Original, node: usize, order: &Order) -> Taken {
    if node == 0 {
        return original.take(order).await.unwrap();
    }
    replayed(original, node).await;
    let source = original.source(node, original.nodes[node].session().await, Some(original.session().await));
    take(&original.repository, source, order, &watch::Sender::new(Progress::default())).await.unwrap()
}

/// Waits until a standby has replayed all that the first node has written.
async fn replayed(original: &Original, node: usize) {
    let at = ask(&original.session().await, "SELECT pg_current_wal_flush_lsn()").await;
    let there = format!("SELECT pg_last_wal_replay_lsn() >= '{at}'");
    let session = original.nodes[node].session().await;
    until("the standby has it all", async || (ask(&session, &there).await == "t").then_some(())).await;
}

fn was_by_wal(taken: &Taken) {
    let changes = changes(taken);
    assert_eq!((changes.found_by, changes.why), (FoundBy::Wal, None));
    eprintln!(
        "read {} and {} of WAL, kept {}, stored {}",
        taken.read_bytes, changes.wal_bytes, taken.kept_bytes, taken.stored_bytes
    );
    assert!(taken.read_bytes < taken.manifest.bytes / 2, "most of it was not read");
}

/// Backups while everything goes on and while nothing does, of each of `nodes` in turn, each built upon the one before; and what is recovered from the last.
async fn is_page_by_page_what_a_full_one_is(original: &Original, nodes: &[usize]) -> Copy {
    let _archiving = original.archiving();
    let mut parent = original.full().await;
    for round in 0..4 {
        let node = nodes[round % nodes.len()];
        let mut bench = original.start_pgbench(&["-c", "2", "-T", "600"]);
        everything(original).await;
        let goes_on = round % 2 == 0;
        if !goes_on {
            bench.kill().await.unwrap();
        }
        original.run("CHECKPOINT").await;
        let taken = take_of(original, node, &by(Find::Wal, parent.manifest.id)).await;
        bench.kill().await.unwrap();
        was_by_wal(&taken);
        quiet(original).await;
        let full = take_of(original, node, &order(None)).await;
        let unlike = differing(original, &taken.manifest, &full.manifest, goes_on).await;
        assert_eq!(unlike, [], "round {round}");
        parent = taken;
    }
    // The two ways are held against each other, built upon one that was made by WAL.
    everything(original).await;
    original.run("CHECKPOINT").await;
    let both = take_of(original, nodes[0], &by(Find::Both, parent.manifest.id)).await;
    assert_eq!((changes(&both).found_by, changes(&both).why), (FoundBy::Both, None));
    assert_eq!(both.unexplained, []);
    everything(original).await;
    original.run("CHECKPOINT").await;
    let last = take_of(original, nodes[nodes.len() - 1], &by(Find::Wal, both.manifest.id)).await;
    was_by_wal(&last);
    everything(original).await;
    recovered(original, 0, &last.manifest).await
}

/// Recovers a backup to the end of what a node has written; it is what that node is.
async fn recovered(original: &Original, node: usize, manifest: &Manifest) -> Copy {
    let session = superuser(original.nodes[node].instance()).await;
    let (wanted, end) = (digest(&session).await, original.archive_everything_of(node).await);
    let sequences = "SELECT string_agg(sequencename || ' ' || coalesce(last_value, 0), ', ' ORDER BY 1) FROM pg_sequences";
    let behind = ask(&session, sequences).await;
    let archive = original.archive_as_files_of(node).await;
    let copy = Copy::of(original, "r").await;
    copy.restore(original, manifest, copy.wish(&archive, at(end))).await.unwrap();
    let recovered = copy.recover().await;
    assert_eq!(digest(&recovered).await, wanted);
    eprintln!("sequences: {behind}; recovered: {}", ask(&recovered, sequences).await);
    for sequence in ["counted", "seldom", "reset", "cached"] {
        let exists = ask(&recovered, &format!("SELECT to_regclass('{sequence}') IS NOT NULL")).await;
        if exists == "t" {
            let given = ask(&session, &format!("SELECT last_value FROM {sequence}")).await;
            let ahead = ask(&recovered, &format!("SELECT last_value >= {given} FROM {sequence}")).await;
            assert_eq!(ahead, "t", "{sequence} gives no number twice");
        }
    }
    copy.amcheck();
    copy.stop();
    copy
}

story! {
    async fn case_21_an_incremental_by_wal_is_page_by_page_what_a_full_of_the_same_position_is() {
        let original = furnished(&[]).await;
        let copy = is_page_by_page_what_a_full_one_is(&original, &[0]).await;
        checksums(&copy.instance, "--check");
    }
}

story! {
    async fn case_21_an_incremental_by_wal_is_right_without_checksums_and_with_hints_that_are_not_in_wal() {
        let original = furnished(&[]).await;
        original.run("ALTER SYSTEM SET wal_log_hints = off").await;
        control(original.primary(), &["-m", "fast", "stop"]);
        checksums(original.primary(), "--disable");
        start_as_primary(original.primary());
        let off = "SELECT current_setting('wal_log_hints') || current_setting('data_checksums')";
        assert_eq!(ask(&original.session().await, off).await, "offoff");
        is_page_by_page_what_a_full_one_is(&original, &[0]).await;
        control(original.primary(), &["-m", "immediate", "stop"]);
    }
}

story! {
    async fn case_21_an_incremental_by_wal_is_right_of_a_standby_and_of_another_node_than_its_parent() {
        let original = furnished(&["b"]).await;
        let copy = is_page_by_page_what_a_full_one_is(&original, &[1, 0, 1, 1]).await;
        checksums(&copy.instance, "--check");
    }
}

story! {
    async fn case_21_an_incremental_by_wal_goes_over_a_promotion_and_a_rewind() {
        let original = furnished_in_one_place(&["b"]).await;
        let parent = {
            let _archiving = original.archiving();
            let parent = original.full().await;
            original.pgbench(&["-c", "2", "-t", "200"]).await;
            everything(&original).await;
            original.archive_everything().await;
            parent
        };
        replayed(&original, 1).await;
        let [a, b] = &original.nodes[..] else { unreachable!() };
        let order = promote::Order { timeline: Timeline(3), at_least: Lsn(0), names: SyncNames::Empty };
        promote(&b.server, &order, SOON).await.unwrap();
        // The old primary goes on for a while, and nobody else has that.
        let alone = a.session().await;
        alone.batch_execute("SET synchronous_commit = local; UPDATE whole SET x = 'lost'; DELETE FROM untouched WHERE n < 5000").await.unwrap();
        alone.batch_execute("CHECKPOINT").await.unwrap();
        drop(alone);
        let _archiving = original.archiving_of(1);
        let session = b.session().await;
        until("it is open to writes", async || {
            session.batch_execute("INSERT INTO moving SELECT n FROM generate_series(1, 9000) n").await.ok()
        })
        .await;
        session.batch_execute("UPDATE pgbench_accounts SET abalance = 7 WHERE aid % 1000 = 0").await.unwrap();
        let taken = original.take_of(1, &by(Find::Wal, parent.manifest.id)).await.unwrap();
        was_by_wal(&taken);
        assert_eq!(taken.manifest.timeline, Timeline(3));
        let full = original.take_of(1, &crate::original::order(None)).await.unwrap();
        assert_eq!(differing(&original, &taken.manifest, &full.manifest, false).await, []);
        let both = original.take_of(1, &by(Find::Both, parent.manifest.id)).await.unwrap();
        assert_eq!((changes(&both).found_by, both.unexplained), (FoundBy::Both, vec![]));

        // It comes back by a rewind, and is a source itself: its own last WAL counts for nothing.
        a.server.stop(StopMode::Kill, SOON).await.unwrap();
        session.batch_execute("CHECKPOINT").await.unwrap();
        let source = original.herd.remote(b.instance(), roles::REWIND, &original.herd.secrets.rewind).await;
        let wanted = RewindOrder { source, restore_command: None, deadline: SOON };
        let rewound = rewind(a.instance(), &settings(), &wanted, watch::Sender::new(Default::default())).await.unwrap();
        assert!(matches!(rewound, Rewound::Rewound { .. }), "{rewound:?}");
        slots::ensure(&session, &a.member, SOON).await.unwrap();
        original.herd.follow(a.instance(), None, b.instance(), &a.member).await;
        let again = start(a.instance()).await;
        follow::streaming(&superuser(again.instance()).await, &upstream(b.instance(), &a.member), SOON).await.unwrap();
        session.batch_execute("UPDATE hinted SET n = n + 1 WHERE n > 19000; CHECKPOINT").await.unwrap();
        let at = ask(&session, "SELECT pg_current_wal_flush_lsn()").await;
        let on_a = superuser(again.instance()).await;
        let there = format!("SELECT pg_last_wal_replay_lsn() >= '{at}'");
        until("it has it all", async || (ask(&on_a, &there).await == "t").then_some(())).await;
        let of_a = async |order: &Order| {
            let source = original.source(0, superuser(again.instance()).await, Some(b.session().await));
            take(&original.repository, source, order, &watch::Sender::new(Progress::default())).await.unwrap()
        };
        for parent in [&parent, &taken] {
            let of_rewound = of_a(&by(Find::Wal, parent.manifest.id)).await;
            was_by_wal(&of_rewound);
            let full = of_a(&crate::original::order(None)).await;
            assert_eq!(differing(&original, &of_rewound.manifest, &full.manifest, false).await, []);
        }
        session.batch_execute("INSERT INTO moving SELECT 1").await.unwrap();
        recovered(&original, 1, &taken.manifest).await;
    }
}

story! {
    async fn a_page_that_has_changed_without_wal_is_an_alarm() {
        let original = Original::new(&[]).await;
        original.run("CREATE TABLE t AS SELECT n, repeat('x', 100) FROM generate_series(1, 2000) n; CHECKPOINT").await;
        let path = ask(&original.session().await, "SELECT pg_relation_filepath('t')").await;
        let parent = {
            let _archiving = original.archiving();
            original.full().await
        };
        control(original.primary(), &["-m", "fast", "stop"]);
        let file = std::fs::File::options().read(true).write(true).open(original.primary().data_dir.join(&path)).unwrap();
        // As if a record of WAL had changed it that names another page: content and position are others.
        let mut page = vec![0; PAGE];
        file.read_exact_at(&mut page, 3 * PAGE as u64).unwrap();
        page[4] ^= 8;
        page[8000] ^= 1;
        file.write_all_at(&page, 3 * PAGE as u64).unwrap();
        // What PostgreSQL writes without WAL leaves the position as it is.
        file.read_exact_at(&mut page, 5 * PAGE as u64).unwrap();
        page[20] ^= 1;
        file.write_all_at(&page, 5 * PAGE as u64).unwrap();
        start_as_primary(original.primary());
        let _archiving = original.archiving();

        let unseen = original.take(&by(Find::Wal, parent.manifest.id)).await.unwrap();
        assert_eq!(changes(&unseen).found_by, FoundBy::Wal);
        let taken = original.take(&by(Find::Both, parent.manifest.id)).await.unwrap();
        let told: Vec<_> = taken.unexplained.iter().map(|file| (file.path.clone(), file.pages.clone())).collect();
        assert_eq!(told, [(path.clone(), vec![3])]);
        assert_eq!(changes(&taken).unexplained, 1);
        let full = original.full().await;
        assert_eq!(differing(&original, &taken.manifest, &full.manifest, false).await, [], "it was compared");
        let unlike = differing(&original, &unseen.manifest, &full.manifest, false).await;
        assert_eq!(unlike, [(path, 3)], "by WAL alone it is not seen: so the comparison of these tests can fail");

        // Until the two agree again both are looked at.
        let next = original.take(&by(Find::Automatic, taken.manifest.id)).await.unwrap();
        assert_eq!((changes(&next).found_by, next.unexplained), (FoundBy::Both, vec![]));
        control(original.primary(), &["-m", "immediate", "stop"]);
    }
}

story! {
    async fn where_wal_does_not_say_everything_contents_are_compared() {
        let original = Original::new(&[]).await;
        original.pgbench(&["-i", "-s", "1", "-q"]).await;
        let compared = async |parent: &Taken, because: &str| {
            let taken = original.take(&by(Find::Automatic, parent.manifest.id)).await.unwrap();
            let changes = changes(&taken);
            assert_eq!(changes.found_by, FoundBy::Comparison, "{because}");
            assert!(changes.why.as_ref().is_some_and(|why| why.contains(because)), "{because}: {changes:?}");
            let full = original.full().await;
            assert_eq!(differing(&original, &taken.manifest, &full.manifest, false).await, [], "{because}");
            taken
        };
        let parent = {
            let _archiving = original.archiving();
            original.full().await
        };

        // A segment that was never archived, and is here no more.
        let session = original.session().await;
        let name = ask(&session, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())").await;
        original.run("UPDATE pgbench_accounts SET abalance = 3 WHERE aid < 5000; SELECT pg_switch_wal(); CHECKPOINT").await;
        std::fs::remove_file(original.primary().pg_wal().join(&name)).unwrap();
        drop(session);
        let archiving = original.archiving();
        let parent = compared(&parent, &format!("WAL is missing: {name}")).await;
        let again = original.take(&by(Find::Automatic, parent.manifest.id)).await.unwrap();
        assert_eq!(changes(&again).found_by, FoundBy::Wal, "behind the hole all is known");
        drop(archiving);

        control(original.primary(), &["-m", "fast", "stop"]);
        checksums(original.primary(), "--disable");
        start_as_primary(original.primary());
        let archiving = original.archiving();
        let parent = compared(&again, "checksums").await;
        drop(archiving);

        // Filled without WAL.
        control(original.primary(), &["-m", "fast", "stop"]);
        std::fs::remove_file(original.primary().standby_signal()).ok();
        control(original.primary(), &["-o", "-c wal_level=minimal -c max_wal_senders=0 -c archive_mode=off", "start"]);
        let session = original.session().await;
        session.batch_execute("BEGIN; TRUNCATE pgbench_branches; INSERT INTO pgbench_branches SELECT n, 0, '' FROM generate_series(1, 9000) n; COMMIT").await.unwrap();
        drop(session);
        control(original.primary(), &["-m", "fast", "stop"]);
        start_as_primary(original.primary());
        let _archiving = original.archiving();
        compared(&parent, "wal_level was minimal").await;
        control(original.primary(), &["-m", "immediate", "stop"]);
    }
}

story! {
    // A standby begins where its last restart point was, which can be in front of the end of the backup before.
    async fn a_backup_of_an_idle_standby_that_begins_inside_its_parent_is_compared() {
        let original = Original::new(&["b"]).await;
        let _archiving = original.archiving();
        original.pgbench(&["-i", "-s", "1", "-q"]).await;
        let parent = take_of(&original, 1, &order(None)).await;
        // More than the parent begins with, and no checkpoint behind its end.
        let next = take_of(&original, 1, &by(Find::Wal, parent.manifest.id)).await;
        let changes = changes(&next);
        match next.manifest.start < parent.manifest.stop {
            true => assert!(changes.why.is_some_and(|why| why.contains("behind the beginning"))),
            false => assert_eq!(changes.found_by, FoundBy::Wal),
        }
        let full = take_of(&original, 1, &order(None)).await;
        assert_eq!(differing(&original, &next.manifest, &full.manifest, false).await, []);
    }
}

async fn quiet(original: &Original) {
    let session = original.session().await;
    until("nothing goes on", async || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND state = 'active'";
        (ask(&session, busy).await == "1").then_some(())
    })
    .await;
}

/// Pages that are not the same in two backups, and files that only one of them has (page 0). Of main forks those of one position count as the same:
/// they differ by what PostgreSQL writes without WAL. What was changed behind the start of the first one is its recovery's; that is hardly anything but
/// dead rows that a query has removed, unless work went on between the two. Then only main forks say what that was, and nothing else is looked at.
async fn differing(
    original: &Original,
    one: &Manifest,
    full: &Manifest,
    goes_on: bool,
) -> Vec<(String, usize)> {
    let (have, want) = (contents(original, one).await, contents(original, full).await);
    let (mut differ, mut are_later) = (Vec::new(), 0);
    if !goes_on {
        let (have, want): (BTreeSet<_>, BTreeSet<_>) = (have.keys().collect(), want.keys().collect());
        differ.extend(have.symmetric_difference(&want).map(|path| ((*path).clone(), 0)));
    }
    for (path, wanted) in &want {
        let is_main = MainFile::parse(path.as_bytes()).is_some();
        let Some(had) = have.get(path).filter(|_| is_main || !goes_on) else { continue };
        if !goes_on && had.len() != wanted.len() {
            differ.push((path.clone(), had.len().min(wanted.len()) / PAGE));
        }
        for (number, page) in wanted.chunks(PAGE).enumerate() {
            let there = had.get(number * PAGE..(number * PAGE + page.len())).unwrap_or_default();
            let later = is_main && page_lsn(page) > one.start;
            are_later += usize::from(there != page && later);
            let hints = is_main && there.len() == page.len() && page_lsn(there) == page_lsn(page);
            let new = goes_on && there.is_empty() && page.iter().all(|byte| *byte == 0);
            if there != page && !later && !hints && !new {
                differ.push((path.clone(), number));
            }
        }
    }
    assert!(want.len() > 500, "{}", want.len());
    assert!(goes_on || are_later < 20, "{are_later} pages were changed since");
    differ
}

/// Of all files but the control file, which has the position of the backup's own checkpoint.
async fn contents(original: &Original, manifest: &Manifest) -> BTreeMap<String, Vec<u8>> {
    let mut entries = manifest.entries(&original.repository);
    let mut reader = manifest.contents(&original.repository);
    let mut all = BTreeMap::new();
    while let Some(entry) = entries.next().await.unwrap() {
        if entry.kind != Kind::File || entry.path == b"global/pg_control" {
            continue;
        }
        let mut content = Vec::new();
        let take = async |piece: &[u8]| {
            content.extend_from_slice(piece);
            Ok::<_, ReadError>(())
        };
        reader.read_file(&entry, take).await.unwrap();
        assert_eq!(content.len() as u64, entry.size);
        all.insert(String::from_utf8(entry.path).unwrap(), content);
    }
    all
}
