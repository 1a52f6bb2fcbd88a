//! What is written by somebody else: right, damaged, and made up.

use std::io::Write;
use std::os::unix::fs::symlink;

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};

use super::*;
use crate::hash::to_hex;
use crate::wal::{Fetched, Segment, Segments, Wal, segment_header};

const LABEL_OF_FULL: &str = "20261122-214843F";
const LABEL_OF_INCR: &str = "20261122-214843F_20261122-214850I";
const SYSTEM: u64 = 7_711_116_086_329_551_183;
const CONTENT: &[u8] = b"the content of a file that is long enough to be compressed, compressed, compressed";

fn sha1(content: &[u8]) -> String {
    to_hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, content).as_ref())
}

/// A repository with a full and an incremental backup, made by hand.
struct Repository {
    dir: tempfile::TempDir,
    /// Lines of the incremental backup's manifest.
    files: Vec<(String, String)>,
    links: Vec<(String, String)>,
    paths: Vec<String>,
    compression: &'static str,
}

impl Repository {
    fn new() -> Repository {
        let file = |content: &[u8]| {
            format!(r#"{{"checksum":"{}","size":{},"timestamp":1}}"#, sha1(content), content.len())
        };
        let of_full = format!(
            r#"{{"checksum":"{}","reference":"{LABEL_OF_FULL}","size":{},"timestamp":1}}"#,
            sha1(CONTENT),
            CONTENT.len()
        );
        let repository = Repository {
            dir: tempfile::tempdir().unwrap(),
            files: vec![
                ("pg_data/backup_label".to_owned(), file(b"label")),
                ("pg_data/base/1/112".to_owned(), of_full),
                ("pg_data/of=two={".to_owned(), file(CONTENT)),
                ("pg_tblspc/16384/PG_15_1/5/1".to_owned(), file(CONTENT)),
            ],
            links: vec![(
                "pg_data/pg_tblspc/16384".to_owned(),
                r#"{"destination":"/somewhere/far"}"#.to_owned(),
            )],
            paths: ["pg_data", "pg_data/base", "pg_data/pg_tblspc", "pg_tblspc", "pg_tblspc/16384"]
                .map(str::to_owned)
                .to_vec(),
            compression: "none",
        };
        repository.store(LABEL_OF_FULL, "pg_data/base/1/112", CONTENT);
        repository.store(LABEL_OF_FULL, "backup.manifest", b"not looked at");
        repository.store(LABEL_OF_INCR, "pg_data/backup_label", b"label");
        repository.store(LABEL_OF_INCR, "pg_data/of=two={", CONTENT);
        repository.store(LABEL_OF_INCR, "pg_tblspc/16384/PG_15_1/5/1", CONTENT);
        let listed = |label: &str| {
            let text = r#"{"backup-archive-start":"000000010000000000000002","backup-lsn-start":"0/2000028","backup-lsn-stop":"0/2000100","backup-timestamp-stop":1795384126,"backup-type":"x","db-id":1,"option-online":true}"#;
            (label.to_owned(), text.to_owned())
        };
        let (full, incr) = (listed(LABEL_OF_FULL), listed(LABEL_OF_INCR));
        let catalogue = info::write(&[
            ("backrest", &[("backrest-format", "5".to_owned())]),
            ("backup:current", &[(&full.0, full.1), (&incr.0, incr.1)]),
            ("db", &[("db-id", "1".to_owned())]),
            ("db:history", &[("1", format!(r#"{{"db-system-id":{SYSTEM},"db-version":"15"}}"#))]),
        ]);
        repository.put("backup/main/backup.info", catalogue.as_bytes());
        let archive = info::write(&[
            ("backrest", &[("backrest-format", "5".to_owned())]),
            ("db:history", &[("1", format!(r#"{{"db-id":{SYSTEM},"db-version":"15"}}"#))]),
        ]);
        repository.put("archive/main/archive.info", archive.as_bytes());
        repository
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn put(&self, path: &str, content: &[u8]) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn store(&self, label: &str, name: &str, content: &[u8]) {
        self.put(&format!("backup/main/{label}/{name}"), content);
    }

    fn source(&self) -> Source {
        Source::PgBackRest { repository: self.dir.path().to_owned(), stanza: None }
    }

    /// The manifest, and then what comes of it.
    fn contents(&self) -> Result<Contents, ForeignError> {
        let files: Vec<(&str, String)> =
            self.files.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let links: Vec<(&str, String)> =
            self.links.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let paths: Vec<(&str, String)> =
            self.paths.iter().map(|path| (path.as_str(), "{}".to_owned())).collect();
        let manifest = info::write(&[
            ("backrest", &[("backrest-format", "5".to_owned())]),
            (
                "backup",
                &[
                    ("backup-label", format!("\"{LABEL_OF_INCR}\"")),
                    ("backup-lsn-start", "\"0/2000028\"".to_owned()),
                    ("backup-lsn-stop", "\"0/2000100\"".to_owned()),
                ],
            ),
            ("backup:db", &[("db-system-id", SYSTEM.to_string())]),
            ("backup:option", &[("option-compress-type", format!("\"{}\"", self.compression))]),
            ("target:file", &files),
            ("target:file:default", &[("mode", "\"0640\"".to_owned())]),
            ("target:link", &links),
            ("target:path", &paths),
        ]);
        self.store(LABEL_OF_INCR, "backup.manifest", manifest.as_bytes());
        let foreign = Foreign::open(&self.source())?;
        let backup = foreign.backups.iter().find(|backup| backup.name == LABEL_OF_INCR).unwrap();
        foreign.contents(backup)
    }

    /// With another file in its manifest.
    fn with(mut self, key: &str, value: &str) -> Repository {
        self.files.push((key.to_owned(), value.to_owned()));
        self.files.sort();
        self
    }
}

fn whole(contents: &Contents, path: &str) -> Result<Vec<u8>, ForeignError> {
    contents.read_small(path.as_bytes()).map(Option::unwrap_or_default)
}

#[track_caller]
fn refused(came: Result<Contents, ForeignError>, words: &str) {
    let text = came.map(|_| ()).unwrap_err().to_string();
    assert!(text.contains(words), "{text}");
}

#[test]
fn a_backup_is_read_from_where_its_files_are() {
    let repository = Repository::new();
    let contents = repository.contents().unwrap();
    assert_eq!(contents.backup_label, b"label");
    assert_eq!((contents.files, contents.bytes), (3, 3 * CONTENT.len() as u64));
    let paths: Vec<String> =
        contents.items.keys().map(|path| String::from_utf8(path.clone()).unwrap()).collect();
    let wanted = [
        "base",
        "base/1",
        "base/1/112",
        "of=two={",
        "pg_tblspc",
        "pg_tblspc/16384",
        "pg_tblspc/16384/PG_15_1",
        "pg_tblspc/16384/PG_15_1/5",
        "pg_tblspc/16384/PG_15_1/5/1",
    ];
    assert_eq!(paths, wanted);
    assert_eq!(contents.items[b"base/1/112".as_slice()].mode, 0o640);
    assert_eq!(contents.items[b"pg_tblspc/16384".as_slice()].kind, Kind::Link("/somewhere/far".into()));
    for path in ["base/1/112", "of=two={", "pg_tblspc/16384/PG_15_1/5/1"] {
        assert_eq!(whole(&contents, path).unwrap(), CONTENT, "{path}");
    }
    let foreign = Foreign::open(&repository.source()).unwrap();
    let ranges: Vec<BackupRange> = foreign.backups.iter().filter_map(|backup| backup.range).collect();
    assert_eq!(
        ranges.iter().map(|range| range.id.to_string()).collect::<Vec<_>>(),
        ["20261122T214843", "20261122T214850"]
    );
    assert_eq!(foreign.system(), Some(SystemId(SYSTEM)));
    assert_eq!(ranges[0].stopped.to_string(), "2026-11-22T21:48:47Z", "the second is over");
}

#[test]
fn a_manifest_leads_nowhere_else() {
    let file = format!(r#"{{"checksum":"{}","size":{},"timestamp":1}}"#, sha1(CONTENT), CONTENT.len());
    for key in [
        "pg_data/../../etc/cron.d/x",
        "pg_data/..",
        "pg_data/./x",
        "pg_data//etc/passwd",
        "pg_data/",
        "/etc/passwd",
        "etc/passwd",
        "..",
        "pg_tblspc/16384/../../x",
        "pg_tblspc/../pg_data/x",
        "pg_tblspc/016384/x",
        "pg_tblspc/1/x",
        "pg_data/pg_tblspc/16384/x",
        "pg_data/pg_tblspc/9/x",
        "pg_data/base/1/112/below",
        "pg_data/nul\0l",
    ] {
        let came = Repository::new().with(key, &file).contents();
        assert!(matches!(came, Err(ForeignError::Damaged { .. })), "{key}: {came:?}");
    }
    for (key, place) in [
        ("pg_data/pg_tblspc/7", "relative"),
        ("pg_data/pg_tblspc/7", "/a/../../etc"),
        ("pg_data/pg_tblspc/7", ""),
        ("pg_data/pg_tblspc/../x", "/a"),
        ("pg_data/../x", "/a"),
        ("pg_tblspc/7", "/a"),
    ] {
        let mut repository = Repository::new();
        repository.links.push((key.to_owned(), format!(r#"{{"destination":"{place}"}}"#)));
        refused(repository.contents(), "is a link to");
    }
    // Another link than that of a tablespace is not made: what it led to comes inside.
    let mut repository = Repository::new();
    repository.links.push(("pg_data/of=two={".to_owned(), r#"{"destination":"/etc/x"}"#.to_owned()));
    let contents = repository.contents().unwrap();
    assert!(matches!(contents.items[b"of=two={".as_slice()].kind, Kind::File(_)));
    assert!(
        contents.remarks.iter().any(|remark| remark.contains("was a link to /etc/x")),
        "{:?}",
        contents.remarks
    );
    for reference in ["../../x", "20261122-214843F/..", "", "main"] {
        let value =
            format!(r#"{{"checksum":"{}","reference":"{reference}","size":3,"timestamp":1}}"#, sha1(b"abc"));
        refused(Repository::new().with("pg_data/x", &value).contents(), "is no backup");
    }
    let missing =
        format!(r#"{{"checksum":"{}","reference":"20260101-000000F","size":3,"timestamp":1}}"#, sha1(b"abc"));
    refused(
        Repository::new().with("pg_data/x", &missing).contents(),
        "backup 20260101-000000F, which is not there",
    );
    let mut repository = Repository::new();
    repository.paths.push("pg_data/../x".to_owned());
    refused(repository.contents(), "is no path inside");
    for stanza in ["../main", "", ".", "a/b", "main\n"] {
        let source = Source::PgBackRest {
            repository: repository.dir.path().to_owned(),
            stanza: Some(stanza.to_owned()),
        };
        assert!(matches!(Foreign::open(&source), Err(ForeignError::Unknown { .. })), "{stanza:?}");
    }
}

#[test]
fn absurd_sizes_and_values_that_are_none_are_refused() {
    let digest = sha1(b"abc");
    for (value, words) in [
        (r#"{"checksum":"00","size":3,"timestamp":1}"#.to_owned(), "is none"),
        (r#"{"size":3,"timestamp":1}"#.to_owned(), "no checksum of"),
        (format!(r#"{{"checksum":"{digest}","timestamp":1}}"#), "missing field `size`"),
        (format!(r#"{{"checksum":"{digest}","size":-1}}"#), "is none"),
        (format!(r#"{{"checksum":"{digest}","size":18446744073709551615}}"#), "absurd size"),
        (format!(r#"{{"checksum":"{digest}","size":9223372036854775807}}"#), "absurd size"),
        (format!(r#"{{"checksum":"{digest}","mode":"abc","size":3}}"#), "is no mode"),
        (
            format!(r#"{{"bni":1,"bno":18446744073709551615,"checksum":"{digest}","repo-size":9,"size":3}}"#),
            "should have",
        ),
        (format!(r#"{{"bni":77,"checksum":"{digest}","repo-size":9,"size":3}}"#), "cannot look at"),
        (format!(r#"{{"bi":1,"bim":9,"checksum":"{digest}","size":3}}"#), "block by block"),
    ] {
        let repository = Repository::new().with("pg_data/x", &value);
        repository.store(LABEL_OF_INCR, "bundle/1", b"abc");
        refused(repository.contents(), words);
    }
    let mut repository = Repository::new();
    repository.compression = "zip";
    refused(repository.contents(), "compressed by \"zip\"");
}

#[test]
fn a_file_is_read_only_as_it_should_be() {
    let compressed = |content: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    };
    let file = |stored: &[u8], size: usize| {
        format!(
            r#"{{"checksum":"{}","repo-size":{},"size":{size},"timestamp":1}}"#,
            sha1(CONTENT),
            stored.len()
        )
    };
    let read = |stored: &[u8], size: usize| {
        let mut repository = Repository::new();
        repository.compression = "gz";
        let label = compressed(b"label");
        repository.files = vec![
            (
                "pg_data/backup_label".to_owned(),
                format!(r#"{{"checksum":"{}","repo-size":{},"size":5}}"#, sha1(b"label"), label.len()),
            ),
            ("pg_data/x".to_owned(), file(stored, size)),
        ];
        repository.store(LABEL_OF_INCR, "pg_data/backup_label.gz", &label);
        repository.store(LABEL_OF_INCR, "pg_data/x.gz", stored);
        whole(&repository.contents().unwrap(), "x").map_err(|error| error.to_string())
    };
    let (right, size) = (compressed(CONTENT), CONTENT.len());
    assert_eq!(read(&right, size).as_deref(), Ok(CONTENT));
    let damaged = |came: Result<Vec<u8>, String>, words: &str| {
        let text = came.unwrap_err();
        assert!(text.contains("is damaged") && text.contains(words), "{text}");
    };
    damaged(read(&right[..right.len() - 9], size), "");
    damaged(read(b"no gzip at all", size), "");
    damaged(read(&compressed(b"something else, which is of another length"), size), "should have");
    damaged(read(&compressed(&CONTENT.to_ascii_uppercase()), size), "SHA-1");
    // A few bytes that unpack into a gigabyte are not unpacked to their end.
    damaged(read(&compressed(&vec![0; 100_000_000]), size), "longer than");

    let repository = Repository::new();
    let contents = repository.contents().unwrap();
    let place = repository.at(&format!("backup/main/{LABEL_OF_FULL}/pg_data/base/1/112"));
    fs::remove_file(&place).unwrap();
    symlink("/etc/passwd", &place).unwrap();
    refused(repository.contents(), "it is no file");
    assert!(whole(&contents, "base/1/112").is_err(), "a link that came later is not followed either");
    fs::remove_file(&place).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &place, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    assert!(whole(&contents, "base/1/112").is_err(), "nor is anybody waited for");
}

#[test]
fn what_does_not_come_to_its_own_checksum_is_not_believed_and_a_copy_is() {
    let repository = Repository::new();
    repository.contents().unwrap();
    let manifest = repository.at(&format!("backup/main/{LABEL_OF_INCR}/backup.manifest"));
    let text = fs::read_to_string(&manifest).unwrap();
    let foreign = Foreign::open(&repository.source()).unwrap();
    let contents = || foreign.contents(&foreign.backups[1]);
    for damaged in [
        text.replace("16384", "16385"),
        text[..text.len() / 2].to_owned(),
        String::new(),
        text.replace("backrest-format=5", "backrest-format=6"),
        text.replace("[target:file]\n", ""),
        "x".repeat(1000),
    ] {
        fs::write(&manifest, damaged).unwrap();
        assert!(matches!(contents(), Err(ForeignError::Damaged { .. })));
    }
    let mut copy = manifest.clone().into_os_string();
    copy.push(".copy");
    fs::write(&copy, &text).unwrap();
    contents().unwrap();
    fs::write(&manifest, b"Salted__ and what nobody can read").unwrap();
    refused(contents(), "is encrypted");
    // The real one, of pgBackRest 2.45.
    let real = "[backrest]\nbackrest-format=5\nbackrest-version=\"2.45\"\n\n[db]\ndb-id=1\ndb-system-id=7711116086329551183\ndb-version=\"15\"\n\n[db:history]\n1={\"db-id\":7711116086329551183,\"db-version\":\"15\"}\n\n[backrest]\nbackrest-checksum=\"78ab13ab01198eb86e0437f23a6a350f21139cfb\"\n";
    assert_eq!(info::read(real.as_bytes(), |_, _, _| Ok(())), Ok(()));
}

const SEGMENT_BYTES: u32 = 1 << 20;

fn segment(number: u64) -> Segment {
    Segment { timeline: Timeline(1), number }
}

fn wal(number: u64) -> Vec<u8> {
    let segments = Segments::new(SEGMENT_BYTES).unwrap();
    let mut content = segment_header(segments, segment(number), SystemId(SYSTEM));
    content.resize(SEGMENT_BYTES as usize, number as u8);
    content
}

#[tokio::test]
async fn wal_of_pgbackrest_is_what_its_name_says_or_nobody_knows() {
    let repository = Repository::new();
    let segments = Segments::new(SEGMENT_BYTES).unwrap();
    let source =
        Source::PgBackRest { repository: repository.dir.path().to_owned(), stanza: Some("main".to_owned()) };
    let archive = archive::Archive::open(&source, SystemId(SYSTEM), segments).unwrap();
    assert!(archive::Archive::open(&source, SystemId(5), segments).is_err(), "another cluster's WAL");
    let absent = archive.segment(segment(3)).await.unwrap_err();
    assert!(absent.is_absent(), "{absent}");
    let place = |number: u64, sum: &str, ending: &str| {
        let name = segments.file_name(segment(number));
        format!("archive/main/15-1/{}/{name}-{sum}{ending}", &name[..16])
    };
    repository.put(&place(3, &sha1(&wal(3)), ""), &wal(3));
    let packed = zstd::stream::encode_all(&*wal(4), 1).unwrap();
    repository.put(&place(4, &sha1(&wal(4)), ".zst"), &packed);
    repository.put(&place(5, &sha1(&wal(4)), ".zst"), &packed);
    repository.put(&place(6, &sha1(&wal(5)), ""), &wal(6));
    repository.put(&place(7, &sha1(&wal(7)), ".zip"), &wal(7));
    repository.put(&place(8, &sha1(&wal(8)), ""), &wal(8));
    repository.put(&place(8, &sha1(&wal(3)), ""), &wal(8));
    let bomb = zstd::stream::encode_all(&*vec![0; 100 << 20], 1).unwrap();
    repository.put(&place(9, &sha1(&wal(9)), ".zst"), &bomb);
    repository.put("archive/main/15-1/00000002.history", b"1\t0/300060\tno recovery target specified\n");
    assert_eq!(archive.segment(segment(3)).await.unwrap(), wal(3));
    assert_eq!(archive.fetch(segment(4)).await.unwrap(), Fetched::Whole(wal(4).into()));
    for (number, words) in [(5, "begins at"), (6, "hash"), (7, "name"), (8, "several"), (9, "longer")] {
        let error = archive.segment(segment(number)).await.unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(!error.is_absent() && text.contains(words), "{text}");
    }
    let inventory = archive.inventory().unwrap();
    assert!(inventory.has(segment(3)) && inventory.has(segment(4)) && !inventory.has(segment(10)));
    assert!(inventory.has_history(Timeline(2)));
    assert_eq!(archive.history_file(Timeline(2)).await.unwrap().0.timeline(), Timeline(2));
    assert!(archive.history_file(Timeline(3)).await.unwrap_err().is_absent());
    // Where the archive is not, nobody knows what is in it.
    fs::rename(repository.at("archive"), repository.at("unmounted")).unwrap();
    let unsure = archive.segment(segment(3)).await.unwrap_err();
    assert!(!unsure.is_absent(), "{unsure}");
}

/// A home of Barman's with a server.
fn home() -> (tempfile::TempDir, Source) {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["base", "meta", "wals", "incoming", "streaming"] {
        fs::create_dir_all(dir.path().join("main").join(folder)).unwrap();
    }
    let source = Source::Barman { home: dir.path().to_owned(), server: Some("main".to_owned()) };
    (dir, source)
}

const INFO: &str = "backup_label='START\\n'\nbegin_xlog=0/2000028\ncompression=None\nencryption=None\nend_time=2026-11-22 22:05:03.637037+00:00\nend_xlog=0/3000000\nparent_backup_id=None\nstatus=DONE\nsystemid=7711116086329551183\ntablespaces=[('sp', 16384, '/somewhere/far')]\ntimeline=1\nversion=150018\n";
const ID: &str = "20261122T220500";

fn put(dir: &Path, path: &str, content: &[u8]) {
    let path = dir.join("main").join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

#[test]
fn a_backup_of_barman_is_the_files_that_are_there() {
    let (dir, source) = home();
    let dir = dir.path();
    put(dir, &format!("meta/{ID}-backup.info"), INFO.as_bytes());
    put(dir, &format!("base/{ID}/data/base/1/112"), CONTENT);
    put(dir, &format!("base/{ID}/data/pg_wal/000000010000000000000002"), b"not this one");
    put(dir, &format!("base/{ID}/data/postmaster.pid"), b"1");
    put(dir, &format!("base/{ID}/16384/PG_15_1/5/1"), CONTENT);
    fs::create_dir_all(dir.join(format!("main/base/{ID}/data/pg_tblspc"))).unwrap();
    symlink("/etc", dir.join(format!("main/base/{ID}/data/pg_tblspc/16384"))).unwrap();
    let open = || Foreign::open(&source).unwrap();
    let contents = |foreign: &Foreign| foreign.contents(&foreign.backups[0]);
    let foreign = open();
    let read = contents(&foreign).unwrap();
    assert_eq!((read.files, read.backup_label.as_slice()), (2, b"START\n".as_slice()));
    assert_eq!(read.items[b"pg_tblspc/16384".as_slice()].kind, Kind::Link("/somewhere/far".into()));
    assert!(!read.items.contains_key(b"postmaster.pid".as_slice()));
    assert!(!read.items.contains_key(b"pg_wal/000000010000000000000002".as_slice()));
    for path in ["base/1/112", "pg_tblspc/16384/PG_15_1/5/1"] {
        assert_eq!(whole(&read, path).unwrap(), CONTENT, "{path}");
    }
    assert_eq!(foreign.backups[0].version, "15.18");
    assert_eq!(foreign.backups[0].range.unwrap().stop, "0/3000000".parse().unwrap());

    // PostgreSQL's manifest knows where it ended, and what each file is.
    let noted = |content: &[u8]| {
        format!(
            r#"{{ "Path": "base/1/112", "Size": {}, "Last-Modified": "x", "Checksum-Algorithm": "SHA256", "Checksum": "{}" }}"#,
            content.len(),
            to_hex(digest(&SHA256, content).as_ref())
        )
    };
    let manifest = |files: &str| {
        let body = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n{files}\n],\n\"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }}\n],\n"
        );
        let sum = to_hex(digest(&SHA256, body.as_bytes()).as_ref());
        put(
            dir,
            &format!("base/{ID}/data/backup_manifest"),
            format!("{body}\"Manifest-Checksum\": \"{sum}\"}}\n").as_bytes(),
        );
    };
    manifest(&noted(CONTENT));
    let foreign = open();
    assert_eq!(foreign.backups[0].range.unwrap().stop, "0/2000100".parse().unwrap());
    let read = contents(&foreign).unwrap();
    assert_eq!(whole(&read, "base/1/112").unwrap(), CONTENT);
    put(dir, &format!("base/{ID}/data/base/1/112"), &CONTENT.to_ascii_uppercase());
    assert!(whole(&read, "base/1/112").unwrap_err().to_string().contains("SHA-256"));
    manifest(&noted(b"shorter"));
    refused(contents(&open()), "bytes and should have 7");
    fs::remove_file(dir.join(format!("main/base/{ID}/data/base/1/112"))).unwrap();
    refused(contents(&open()), "base/1/112 is in it, and not in the backup");
    let path = dir.join(format!("main/base/{ID}/data/backup_manifest"));
    let text = fs::read_to_string(&path).unwrap();
    for damaged in [text.replace("112", "113"), text[..text.len() - 4].to_owned(), String::new()] {
        fs::write(&path, damaged).unwrap();
        assert!(matches!(contents(&open()), Err(ForeignError::Damaged { .. })));
    }
}

#[test]
fn what_of_barman_is_not_read_or_leads_elsewhere_is_refused() {
    let (dir, source) = home();
    let dir = dir.path();
    put(dir, &format!("base/{ID}/data/base/1/112"), CONTENT);
    put(dir, &format!("base/{ID}/16384/PG_15_1/5/1"), CONTENT);
    for (was, now, words) in [
        ("status=DONE", "status=STARTED", "its status is STARTED"),
        ("status=DONE", "status=SYNCING", "its status is SYNCING"),
        ("compression=None", "compression=gzip", "compressed archives"),
        ("encryption=None", "encryption=gpg", "is encrypted"),
        ("parent_backup_id=None", "parent_backup_id=20261120T100000", "incremental one"),
        ("status=DONE", "status=DONE\nsnapshots_info={'provider': 'gcp'}", "snapshot of volumes"),
        ("begin_xlog=0/2000028", "begin_xlog=0/9000028", "between which positions"),
        ("'/somewhere/far'", "'far'", "cannot be understood"),
        ("'/somewhere/far'", "'/a/../../etc'", "cannot be understood"),
        ("16384, ", "'16384', ", "cannot be understood"),
        ("16384, ", "99, ", "/99"),
    ] {
        // Before Barman 3.13 it lay there.
        put(dir, &format!("base/{ID}/backup.info"), INFO.replace(was, now).as_bytes());
        let foreign = Foreign::open(&source).unwrap();
        refused(foreign.contents(&foreign.backups[0]), words);
    }
    put(dir, &format!("base/{ID}/backup.info"), INFO.as_bytes());
    let foreign = Foreign::open(&source).unwrap();
    foreign.contents(&foreign.backups[0]).unwrap();
    symlink("/etc", dir.join(format!("main/base/{ID}/data/base/2"))).unwrap();
    refused(foreign.contents(&foreign.backups[0]), "is a link or no file");
    for server in ["../main", "", "other", "main/base"] {
        let source = Source::Barman { home: dir.to_owned(), server: Some(server.to_owned()) };
        assert!(Foreign::open(&source).is_err(), "{server}");
    }
}

#[tokio::test]
async fn wal_of_barman_is_recognised_by_its_content() {
    let (dir, source) = home();
    let dir = dir.path();
    let segments = Segments::new(SEGMENT_BYTES).unwrap();
    let archive = archive::Archive::open(&source, SystemId(SYSTEM), segments).unwrap();
    let name = |number: u64| segments.file_name(segment(number));
    let place = |number: u64| format!("wals/{}/{}", &name(number)[..16], name(number));
    put(dir, &place(3), &wal(3));
    let mut bz2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bz2.write_all(&wal(4)).unwrap();
    put(dir, &place(4), &bz2.finish().unwrap());
    let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
    lz4.write_all(&wal(5)).unwrap();
    put(dir, &place(5), &lz4.finish().unwrap());
    put(dir, &format!("incoming/{}", name(6)), &wal(6));
    put(dir, &place(7), b"\xfd7zXZ\x00 and so on");
    put(dir, &format!("incoming/{}", name(8)), &wal(8)[..1000]);
    for number in 3..=6 {
        assert_eq!(archive.segment(segment(number)).await.unwrap(), wal(number), "{number}");
    }
    let xz = archive.segment(segment(7)).await.unwrap_err();
    let text = format!("{xz}: {}", std::error::Error::source(&xz).unwrap());
    assert!(!xz.is_absent() && text.contains("xz"), "{text}");
    let growing = archive.segment(segment(8)).await.unwrap_err();
    assert!(!growing.is_absent(), "what is still being copied is not absent: {growing}");
    fs::remove_file(dir.join("main").join(place(7))).unwrap();
    fs::remove_file(dir.join("main/incoming").join(name(8))).unwrap();

    // Of the last one what was streamed, and of no other.
    let mut partial = wal(7);
    partial[500_000..].fill(0);
    put(dir, &format!("streaming/{}.partial", name(7)), &partial);
    let beginning =
        Fetched::Beginning { content: partial.into(), end: Lsn(7 * u64::from(SEGMENT_BYTES) + 500_000) };
    assert_eq!(archive.fetch(segment(7)).await.unwrap(), beginning);
    put(dir, &place(8), &wal(8));
    assert!(archive.fetch(segment(7)).await.unwrap_err().is_absent(), "a hole is a hole");
    assert!(archive.fetch(segment(9)).await.unwrap_err().is_absent());
    fs::rename(dir.join("main/wals"), dir.join("unmounted")).unwrap();
    assert!(!archive.fetch(segment(9)).await.unwrap_err().is_absent());
}

#[test]
fn random_bytes_are_never_a_manifest_and_never_a_panic() {
    use proptest::prelude::*;
    let mut runner = proptest::test_runner::TestRunner::default();
    let lines =
        prop::collection::vec("(\\[[a-z:]{1,12}\\]|[a-z/.]{0,12}=?[\\[{\"a-z0-9:,}\\]]{0,20})", 0..20);
    runner
        .run(&(prop::collection::vec(any::<u8>(), 0..400), lines), |(bytes, lines)| {
            prop_assert!(info::read(&*bytes, |_, _, _| Ok(())).is_err());
            prop_assert!(info::read(lines.join("\n").as_bytes(), |_, _, _| Ok(())).is_err());
            prop_assert!(server_manifest::files(&bytes).is_err());
            let text = String::from_utf8_lossy(&bytes).into_owned();
            python::string(&text);
            python::tablespaces(&text);
            server_manifest::stop(&bytes);
            Ok(())
        })
        .unwrap();
}
