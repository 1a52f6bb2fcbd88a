//! Texts as PostgreSQL takes them, answers as it gives them, and whatever else somebody in its place could send.

use proptest::prelude::*;

use super::*;
use crate::message::ServerMessage;

fn row(fields: &[Option<&str>]) -> BytesMut {
    let fields: Vec<Option<&[u8]>> = fields.iter().map(|field| field.map(str::as_bytes)).collect();
    let mut out = BytesMut::new();
    build::data_row(&mut out, &fields).unwrap();
    out.split_off(5)
}

fn values(body: &[u8]) -> Values<'_> {
    let ServerMessage::DataRow(values) = ServerMessage::parse(b'D', body).unwrap() else { panic!() };
    values
}

fn wal(start: u64, end: u64, wal: &[u8]) -> Vec<u8> {
    [&b"w"[..], &start.to_be_bytes(), &end.to_be_bytes(), &7_u64.to_be_bytes(), wal].concat()
}

#[test]
fn commands_are_what_the_grammar_takes() {
    let slot = SlotName::new("pgherd_wal").unwrap();
    let start = Command::StartReplication { slot: Some(&slot), start: 0x16_B374_D848, timeline: 3 };
    for (command, text) in [
        (Command::IdentifySystem, "IDENTIFY_SYSTEM"),
        (Command::TimelineHistory(12), "TIMELINE_HISTORY 12"),
        (Command::ReadReplicationSlot(&slot), "READ_REPLICATION_SLOT \"pgherd_wal\""),
        (start, "START_REPLICATION SLOT \"pgherd_wal\" PHYSICAL 16/B374D848 TIMELINE 3"),
        (
            Command::StartReplication { slot: None, start: 0, timeline: 1 },
            "START_REPLICATION PHYSICAL 0/0 TIMELINE 1",
        ),
        (Command::Show("block_size"), "SHOW block_size"),
        (
            Command::BaseBackup { label: "it's", fast: true, is_15: true },
            "BASE_BACKUP (LABEL 'it''s', CHECKPOINT 'fast', PROGRESS, WAIT false, TABLESPACE_MAP, VERIFY_CHECKSUMS false, \
             MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C')",
        ),
        (
            Command::BaseBackup { label: "a", fast: true, is_15: false },
            "BASE_BACKUP LABEL 'a' PROGRESS FAST NOWAIT TABLESPACE_MAP NOVERIFY_CHECKSUMS MANIFEST 'yes' \
             MANIFEST_CHECKSUMS 'CRC32C'",
        ),
    ] {
        assert_eq!(command.to_string(), text);
    }
    let long = "x".repeat(64);
    for wrong in ["", "A", "a b", "a\"", "a;b", "ä", "a\0", &long] {
        assert_eq!(SlotName::new(wrong), None, "{wrong:?}");
    }
}

#[test]
fn answers_are_read_as_postgresql_gives_them() {
    let identity = row(&[Some("7710446319187015404"), Some("3"), Some("0/401DC18"), None]);
    let expected = Identity { system_identifier: 7_710_446_319_187_015_404, timeline: 3, end: 0x401_DC18 };
    assert_eq!(Identity::read(&values(&identity)), Ok(expected));
    for (text, bytes) in [("16MB", 16 << 20), ("1GB", 1 << 30), ("1MB", 1 << 20), ("512kB", 512 << 10)] {
        assert_eq!(segment_bytes(&values(&row(&[Some(text)]))), Ok(bytes), "{text}");
    }
    let history = row(&[Some("00000002.history"), Some("1\t0/3000060\tx\n")]);
    assert_eq!(timeline_history(2, &values(&history)), Ok(&b"1\t0/3000060\tx\n"[..]));
    assert!(timeline_history(3, &values(&history)).is_err(), "another timeline's");
    let slot = row(&[Some("physical"), Some("1/2"), Some("4")]);
    let restart = Restart { at: 1 << 32 | 2, timeline: 4 };
    assert_eq!(SlotPosition::read(&values(&slot)), Ok(Some(SlotPosition { restart: Some(restart) })));
    let unused = row(&[Some("physical"), None, None]);
    assert_eq!(SlotPosition::read(&values(&unused)), Ok(Some(SlotPosition { restart: None })));
    assert_eq!(SlotPosition::read(&values(&row(&[None, None, None]))), Ok(None));
    let next = row(&[Some("4"), Some("0/5000000")]);
    assert_eq!(Next::read(&values(&next)), Ok(Next { timeline: 4, from: 0x500_0000 }));
}

#[test]
fn a_base_backup_says_where_it_begins_what_it_has_and_what_each_piece_is() {
    let edge = row(&[Some("0/2000028"), Some("3")]);
    assert_eq!(BackupEdge::read(&values(&edge)), Ok(BackupEdge { at: 0x200_0028, timeline: 3 }));
    let tablespace = row(&[Some("16384"), Some("/srv/fast"), Some("12")]);
    let expected = BackedUp { tablespace: Some((16384, b"/srv/fast".to_vec())), kib: 12 };
    assert_eq!(BackedUp::read(&values(&tablespace)), Ok(expected));
    let base = row(&[None, None, Some("24000")]);
    assert_eq!(BackedUp::read(&values(&base)), Ok(BackedUp { tablespace: None, kib: 24000 }));
    for wrong in [[Some("x"), Some("/srv"), Some("1")], [None, Some("/srv"), Some("1")], [None, None, None]] {
        assert!(BackedUp::read(&values(&row(&wrong))).is_err(), "{wrong:?}");
    }
    for (body, piece) in [
        (&b"nbase.tar\0\0"[..], BackupPiece::Archive { name: b"base.tar" }),
        (b"m", BackupPiece::Manifest),
        (b"dabc", BackupPiece::Content(b"abc")),
        (b"p\0\0\0\0\0\0\0\x01", BackupPiece::Progress),
    ] {
        assert_eq!(BackupPiece::parse(body), Ok(piece));
    }
    assert!(BackupPiece::parse(b"x").is_err() && BackupPiece::parse(b"").is_err());
}

#[test]
fn answers_that_do_not_read_in_full_are_refused() {
    let rows: [&[Option<&str>]; 10] = [
        &[],
        &[None, None, None],
        &[Some("-1"), Some("1"), Some("0/1")],
        &[Some("1"), Some("0"), Some("0/1")],
        &[Some("1"), Some("4294967296"), Some("0/1")],
        &[Some("1"), Some("1"), Some("0")],
        &[Some("1"), Some("1"), Some("0/123456789")],
        &[Some("1"), Some("1"), Some("+1/1")],
        &[Some("ä"), Some("1"), Some("0/1")],
        &[Some("99999999999999999999"), Some("1"), Some("0/1")],
    ];
    for fields in rows {
        assert!(Identity::read(&values(&row(fields))).is_err(), "{fields:?}");
    }
    for text in ["", "MB", "16", "16TB", "16 MB", "-1MB", "4GB", "99999999999MB"] {
        assert!(segment_bytes(&values(&row(&[Some(text)]))).is_err(), "{text}");
    }
    assert!(SlotPosition::read(&values(&row(&[Some("logical"), Some("0/1"), Some("1")]))).is_err());
    assert!(SlotPosition::read(&values(&row(&[Some("physical"), Some("0/1"), None]))).is_err());
}

#[test]
fn what_is_streamed_is_read_and_what_is_said_is_written() {
    let body = wal(0x1000, 0x2000, b"some WAL");
    let expected = Streamed::Wal { start: 0x1000, wal: b"some WAL", server_end: 0x2000 };
    assert_eq!(Streamed::parse(&body), Ok(expected));
    assert!(!format!("{expected:?}").contains("some"), "WAL is not printed");
    let keepalive = [&b"k"[..], &5_u64.to_be_bytes(), &7_u64.to_be_bytes(), &[1]].concat();
    assert_eq!(Streamed::parse(&keepalive), Ok(Streamed::Keepalive { server_end: 5, wants_reply: true }));

    let mut out = BytesMut::new();
    let update = StatusUpdate { written: 2, flushed: 1, at: -3, wants_reply: false };
    update.write(&mut out).unwrap();
    let numbers = [2_u64, 1, 0].map(u64::to_be_bytes).concat();
    let body = [&b"d\0\0\0\x26r"[..], &numbers, &(-3_i64).to_be_bytes(), &[0]].concat();
    assert_eq!(out, body);
}

#[test]
fn wal_beyond_the_last_position_and_more_than_a_sender_sends_is_refused() {
    assert!(Streamed::parse(&wal(u64::MAX, 0, b"ab")).is_err());
    assert!(Streamed::parse(&wal(0, 0, &vec![0; MAX_WAL_BYTES])).is_ok());
    assert!(Streamed::parse(&wal(0, 0, &vec![0; MAX_WAL_BYTES + 1])).is_err());
    assert!(Streamed::parse(b"").is_err());
    assert!(Streamed::parse(b"x").is_err());
    let keepalive = [&b"k"[..], &[0; 18]].concat();
    assert!(Streamed::parse(&keepalive).is_err(), "a byte more");
    assert!(Streamed::parse(&keepalive[..17]).is_err(), "a byte less");
}

proptest! {
    /// Nothing panics, and what was read says again what was there.
    #[test]
    fn any_bytes_are_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..64), kind in 0..3) {
        let mut body = body;
        if let (Some(first), 0 | 1) = (body.first_mut(), kind) {
            *first = if kind == 0 { b'w' } else { b'k' };
        }
        if let Ok(Streamed::Wal { start, wal: bytes, server_end }) = Streamed::parse(&body) {
            let again = wal(start, server_end, bytes);
            prop_assert_eq!(&again[..17], &body[..17]);
            prop_assert_eq!(bytes, &body[WAL_HEADER_BYTES..]);
        }
    }

    #[test]
    fn positions_are_read_as_they_are_shown(position in any::<u64>()) {
        prop_assert_eq!(read_position(&shown(position)), Some(position));
    }
}
