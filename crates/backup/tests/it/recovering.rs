//! Plans held against what PostgreSQL does: each target is recovered for real, and the copy ends with the transaction that the plan
//! names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgherd_backup::format::Repository;
use pgherd_backup::name::BackupId;
use pgherd_backup::receive::Object;
use pgherd_backup::recovery::{self, Line, Plan, Refusal, Sources, Target};
use pgherd_backup::store::Store;
use pgherd_backup::wal::{Archive, BackupRange, Inventory, Segments};
use pgherd_core::types::{Lsn, SystemId, Timeline};

use crate::server::{Server, as_user, programs, sql};

const SEGMENT_BYTES: u32 = 16 << 20;
const SOON: Duration = Duration::from_secs(60);

/// A base backup on disk, and its range.
struct Taken {
    directory: PathBuf,
    range: BackupRange,
}

/// Everything of a test in one directory.
struct Scene {
    place: tempfile::TempDir,
    archive: Archive,
    /// What the archive holds, as files for `restore_command`.
    files: PathBuf,
    backups: Vec<Taken>,
}

impl Scene {
    async fn begin(server: &Server) -> Scene {
        // Nothing is recycled before it is archived.
        sql(server, "ALTER SYSTEM SET wal_keep_size = '1GB'");
        sql(server, "SELECT pg_reload_conf()");
        let place = tempfile::tempdir().unwrap();
        let [repository, files] = ["repository", "files"].map(|name| place.path().join(name));
        fs::create_dir(&repository).unwrap();
        fs::create_dir(&files).unwrap();
        let repository =
            Repository::create(Store::directory(&repository), None, Timestamp::now()).await.unwrap();
        let system: u64 = sql(server, "SELECT system_identifier FROM pg_control_system()").parse().unwrap();
        let archive = Archive::new(&repository, SystemId(system), Segments::new(SEGMENT_BYTES).unwrap());
        Scene { place, archive, files, backups: Vec::new() }
    }

    /// Copies the data directory between the two functions, as a backup does.
    fn back_up(&mut self, server: &Server, number: u8) {
        let directory = self.place.path().join(format!("backup{number}"));
        let script = format!(
            "SELECT 'start ' || pg_backup_start('it', true);\n\\! cp -a {} {}\n\
             SELECT 'stop ' || lsn FROM (SELECT lsn, set_config('it.label', labelfile, false) FROM pg_backup_stop(false)) s;\n\
             \\o {}/backup_label\nSELECT current_setting('it.label');\n",
            server.data_dir().display(),
            directory.display(),
            directory.display(),
        );
        let mut psql = Command::new(programs().join("psql"))
            .args(["-h", "127.0.0.1", "-U", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1", "-p"])
            .args([&server.port.to_string(), "postgres"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut psql.stdin.take().unwrap(), script.as_bytes()).unwrap();
        let said = String::from_utf8(psql.wait_with_output().unwrap().stdout).unwrap();
        let at = |word: &str| -> Lsn {
            said.lines().find_map(|line| line.strip_prefix(word)).expect(&said).trim().parse().unwrap()
        };
        let timeline = sql(server, "SELECT timeline_id FROM pg_control_checkpoint()").parse().unwrap();
        let stopped = Timestamp::now();
        let range = BackupRange {
            id: format!("2026112{number}T000000").parse().unwrap(),
            timeline: Timeline(timeline),
            start: at("start "),
            stop: at("stop "),
            stopped,
        };
        fs::remove_dir_all(directory.join("pg_wal")).unwrap();
        fs::create_dir_all(directory.join("pg_wal")).unwrap();
        for leftover in ["postmaster.pid", "postmaster.opts"] {
            fs::remove_file(directory.join(leftover)).ok();
        }
        self.backups.push(Taken { directory, range });
    }

    /// Everything in a `pg_wal` that is complete, and histories.
    async fn archive(&self, pg_wal: &Path, up_to: &str) {
        let segments = self.archive.segments();
        for entry in fs::read_dir(pg_wal).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let content = if path.is_file() { fs::read(&path).unwrap() } else { continue };
            if let Some(timeline) = name.strip_suffix(".history") {
                let timeline = Timeline(u32::from_str_radix(timeline, 16).unwrap());
                self.archive.put_history(timeline, &content).await.unwrap();
            } else if let Some(segment) = segments.parse(&name).filter(|_| name[8..] < up_to[8..]) {
                self.archive.put_segment(segment, &content).await.unwrap();
            } else {
                continue;
            }
            fs::copy(&path, self.files.join(&name)).unwrap();
        }
    }

    /// What there is of the segment that is being written, as a stream archives it.
    async fn archive_beginning(&self, server: &Server) {
        let flushed: Lsn = sql(server, "SELECT pg_current_wal_flush_lsn()").parse().unwrap();
        let name = sql(server, "SELECT pg_walfile_name(pg_current_wal_flush_lsn())");
        let segment = self.archive.segments().parse(&name).unwrap();
        let mut content = fs::read(server.data_dir().join("pg_wal").join(&name)).unwrap();
        let bytes = (flushed.0 - self.archive.segments().start(segment).0) as usize;
        let (one, other) = (bytes / 2, bytes);
        for (from, to) in [(0, one), (one, other)] {
            let content = content[from..to].to_vec().into();
            let from = from as u32;
            self.archive.put(&Object::Piece { segment, from, content }).await.unwrap();
        }
        content[bytes..].fill(0);
        fs::write(self.files.join(&name), content).unwrap();
    }

    async fn plan(&self, target: &Target, line: Line, backup: Option<BackupId>) -> Result<Plan, Refusal> {
        let inventory = self.archive.inventory().await.unwrap();
        let backups: Vec<BackupRange> = self.backups.iter().map(|taken| taken.range).collect();
        let sources = Sources { archive: &self.archive, inventory: &inventory, backups: &backups };
        recovery::plan(&sources, target, line, backup).await
    }

    /// Recovers as planned. The copy is gone with its server.
    fn recover(&self, plan: &Plan) -> Server {
        let taken = self.backups.iter().find(|taken| taken.range.id == plan.backup.id).unwrap();
        let copy = self.place.path().join("copy");
        fs::remove_dir_all(&copy).ok();
        assert!(Command::new("cp").arg("-a").args([&taken.directory, &copy]).status().unwrap().success());
        let mut settings = format!(
            "restore_command = 'cp {}/%f %p'\nrecovery_target_action = 'promote'\n",
            self.files.display()
        );
        for (name, value) in plan.settings() {
            settings += &format!("{name} = '{value}'\n");
        }
        fs::write(copy.join("postgresql.auto.conf"), settings).unwrap();
        fs::write(copy.join("recovery.signal"), "").unwrap();
        let server = Server::over(copy);
        let began = Instant::now();
        while sql(&server, "SELECT pg_is_in_recovery()") == "t" {
            assert!(began.elapsed() < SOON, "recovery does not end");
            // sleep: between two looks.
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

fn transactions(server: &Server) -> Vec<u32> {
    let rows = sql(server, "SELECT xid FROM ledger ORDER BY n");
    rows.lines().map(|row| row.parse().unwrap()).collect()
}

/// One transaction each; returns them.
fn write(server: &Server, count: u32) -> Vec<u32> {
    (0..count)
        .map(|_| {
            sql(server, "INSERT INTO ledger (xid) VALUES (pg_current_xact_id()::text::bigint) RETURNING xid")
        })
        .map(|xid| xid.parse().unwrap())
        .collect()
}

fn switch(server: &Server) -> String {
    write(server, 1);
    sql(server, "SELECT pg_walfile_name(pg_switch_wal())");
    sql(server, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
}

fn block_on<F: Future<Output = ()>>(story: F) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(story);
}

/// Plans and recovers; the copy has exactly what the plan says. Returns its last transaction.
async fn both(scene: &Scene, target: Target, line: Line) -> Option<u32> {
    let plan = scene.plan(&target, line, None).await.unwrap_or_else(|refusal| panic!("{target}: {refusal}"));
    let there = transactions(&scene.recover(&plan));
    if let Some(last) = plan.end.last {
        // The backup may have some of the table already, so the last one is what counts.
        assert_eq!(there.last(), Some(&last.xid), "{target}: {plan:?}");
    }
    if let Some(next) = plan.end.next {
        assert!(!there.contains(&next.xid), "{target}: {plan:?}");
    }
    there.last().copied()
}

#[test]
fn case_22_a_recovery_ends_where_the_plan_says_for_every_kind_of_target() {
    as_user("recovering::case_22_a_recovery_ends_where_the_plan_says_for_every_kind_of_target", &[], || {
        block_on(async {
            let server = Server::start();
            sql(&server, "CREATE TABLE ledger (n serial PRIMARY KEY, xid bigint)");
            let mut scene = Scene::begin(&server).await;
            let before_all = Timestamp::now();
            write(&server, 3);
            scene.back_up(&server, 1);
            let first = write(&server, 5);
            scene.back_up(&server, 2);
            let second = write(&server, 5);
            let between = Timestamp::now();
            let mark: Lsn = sql(&server, "SELECT pg_current_wal_insert_lsn()").parse().unwrap();
            sql(&server, "SELECT pg_create_restore_point('here')");
            let third = write(&server, 5);
            sql(&server, "SELECT pg_create_restore_point('here')");
            let end = switch(&server);
            scene.archive(&server.data_dir().join("pg_wal"), &end).await;

            let last_of_all = both(&scene, Target::Latest, Line::Latest).await;
            assert!(last_of_all > third.last().copied());
            let plan = scene.plan(&Target::Immediate, Line::Latest, None).await.unwrap();
            assert_eq!(plan.backup.id, scene.backups[1].range.id, "the newest one");
            assert_eq!(both(&scene, Target::Immediate, Line::Latest).await, first.last().copied());
            assert_eq!(
                both(&scene, Target::Time { at: between, inclusive: true }, Line::Latest).await,
                second.last().copied()
            );
            for inclusive in [true, false] {
                let expected = if inclusive { second[2] } else { second[1] };
                let target = Target::Xid { xid: second[2], inclusive };
                assert_eq!(both(&scene, target, Line::Latest).await, Some(expected));
                let target = Target::Lsn { at: mark, inclusive };
                assert_eq!(both(&scene, target, Line::Latest).await, second.last().copied());
            }
            // Exactly at a commit: with it, or without it.
            let plan = scene
                .plan(&Target::Xid { xid: third[0], inclusive: true }, Line::Latest, None)
                .await
                .unwrap();
            let commit = plan.end.last.unwrap();
            assert_eq!(commit.xid, third[0]);
            for (inclusive, expected) in [(true, third[0]), (false, second[4])] {
                let target = Target::Time { at: commit.at, inclusive };
                assert_eq!(both(&scene, target, Line::Latest).await, Some(expected), "{inclusive}");
                let target = Target::Lsn { at: commit.lsn, inclusive };
                assert_eq!(both(&scene, target, Line::Latest).await, Some(expected), "{inclusive}");
            }
            // Of two of one name the first.
            assert_eq!(
                both(&scene, Target::Name("here".to_owned()), Line::Latest).await,
                second.last().copied()
            );
            // Before the newest backup: the older one does it.
            let target = Target::Xid { xid: first[1], inclusive: true };
            assert_eq!(both(&scene, target.clone(), Line::Latest).await, Some(first[1]));
            let plan = scene.plan(&target, Line::Latest, None).await.unwrap();
            assert_eq!(plan.backup.id, scene.backups[0].range.id);

            // What is not there is refused, with what is.
            let refused = async |target: Target| scene.plan(&target, Line::Latest, None).await.unwrap_err();
            let later = Target::Time { at: Timestamp::now(), inclusive: true };
            let refusal = refused(later).await;
            assert!(
                matches!(&refusal, Refusal::AfterEnd { last: Some(last), .. } if Some(last.xid) == last_of_all),
                "{refusal}"
            );
            let refusal = refused(Target::Time { at: before_all, inclusive: true }).await;
            assert!(matches!(refusal, Refusal::BeforeWindow { .. }), "{refusal}");
            let inside = Target::Lsn { at: scene.backups[0].range.start, inclusive: true };
            assert!(matches!(refused(inside).await, Refusal::BeforeWindow { .. }));
            let refusal = refused(Target::Name("nowhere".to_owned())).await;
            assert!(matches!(refusal, Refusal::NotFound { .. }), "{refusal}");
            // Without a segment: what is before it can be had back, what is behind it cannot.
            let mut holed = Inventory::new(scene.archive.segments());
            let inventory = scene.archive.inventory().await.unwrap();
            let missing = scene.archive.segments().number(scene.backups[1].range.start);
            inventory
                .segments()
                .filter(|segment| segment.number != missing)
                .for_each(|segment| holed.add(segment));
            let backups = [scene.backups[0].range];
            let sources = Sources { archive: &scene.archive, inventory: &holed, backups: &backups };
            let before = Target::Xid { xid: first[1], inclusive: true };
            let planned = recovery::plan(&sources, &before, Line::Latest, None).await.unwrap();
            assert_eq!(planned.end.last.unwrap().xid, first[1]);
            for behind in [Target::Latest, Target::Xid { xid: third[1], inclusive: true }] {
                let refusal = recovery::plan(&sources, &behind, Line::Latest, None).await.unwrap_err();
                assert!(matches!(&refusal, Refusal::Hole { gap, .. } if gap.from < mark), "{refusal}");
            }
            let refusal = refused(Target::Lsn { at: Lsn(mark.0 + (1 << 40)), inclusive: true }).await;
            assert!(matches!(refusal, Refusal::AfterEnd { .. }), "{refusal}");
        });
    });
}

#[test]
fn what_came_of_a_segment_that_is_not_complete_is_recovered_and_planned() {
    as_user("recovering::what_came_of_a_segment_that_is_not_complete_is_recovered_and_planned", &[], || {
        block_on(async {
            let server = Server::start();
            sql(&server, "CREATE TABLE ledger (n serial PRIMARY KEY, xid bigint)");
            let mut scene = Scene::begin(&server).await;
            scene.back_up(&server, 1);
            write(&server, 3);
            let end = switch(&server);
            scene.archive(&server.data_dir().join("pg_wal"), &end).await;
            let whole = both(&scene, Target::Latest, Line::Latest).await.unwrap();
            let since = write(&server, 3);
            scene.archive_beginning(&server).await;
            assert!(since[0] > whole);
            assert_eq!(both(&scene, Target::Latest, Line::Latest).await, Some(since[2]));
            let target = Target::Xid { xid: since[0], inclusive: true };
            assert_eq!(both(&scene, target, Line::Latest).await, Some(since[0]));
            let later = Target::Time { at: Timestamp::now(), inclusive: true };
            let refusal = scene.plan(&later, Line::Latest, None).await.unwrap_err();
            assert!(
                matches!(&refusal, Refusal::AfterEnd { last: Some(last), .. } if last.xid == since[2]),
                "{refusal}"
            );
        });
    });
}

#[test]
fn case_22_after_two_recoveries_to_earlier_moments_every_line_of_history_can_be_had_back() {
    as_user(
        "recovering::case_22_after_two_recoveries_to_earlier_moments_every_line_of_history_can_be_had_back",
        &[],
        || {
            block_on(async {
                let server = Server::start();
                sql(&server, "CREATE TABLE ledger (n serial PRIMARY KEY, xid bigint)");
                let mut scene = Scene::begin(&server).await;
                scene.back_up(&server, 1);
                let common = write(&server, 3);
                let lost = write(&server, 3);
                let end = switch(&server);
                scene.archive(&server.data_dir().join("pg_wal"), &end).await;
                let mut lasts = BTreeMap::from([(Timeline(1), *transactions(&server).last().unwrap())]);

                // Twice it is recovered to the same earlier moment, and goes on from there.
                for timeline in [2, 3] {
                    let target = Target::Xid { xid: common[2], inclusive: true };
                    let plan = scene.plan(&target, Line::To(Timeline(1)), None).await.unwrap();
                    let copy = scene.recover(&plan);
                    assert_eq!(transactions(&copy).last(), Some(&common[2]));
                    write(&copy, 4);
                    let end = switch(&copy);
                    assert_eq!(&end[..8], format!("{timeline:08X}"));
                    lasts.insert(Timeline(timeline), *transactions(&copy).last().unwrap());
                    scene.archive(&copy.data_dir().join("pg_wal"), &end).await;
                }
                for (timeline, last) in &lasts {
                    assert_eq!(
                        both(&scene, Target::Latest, Line::To(*timeline)).await,
                        Some(*last),
                        "timeline {timeline}"
                    );
                }
                assert_eq!(both(&scene, Target::Latest, Line::Latest).await, Some(lasts[&Timeline(3)]));
                // What is on the line that was left is not on the latest one, though positions and numbers are used again there.
                let target = Target::Xid { xid: lost[1], inclusive: true };
                let back = both(&scene, target, Line::To(Timeline(1))).await;
                assert_eq!(back, Some(lost[1]));
                let refusal = scene.plan(&Target::Latest, Line::To(Timeline(7)), None).await.unwrap_err();
                assert!(matches!(refusal, Refusal::NoTimeline { timeline: Timeline(7) }), "{refusal}");
            });
        },
    );
}
