//! The opening: golden packets, every split, and the tricks that have a CVE. Leaves out the options string.

use super::*;

fn packet_of(body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32 + 4).to_be_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn startup(body: &[u8]) -> Result<StartupMessage<'_>, StartupError> {
    match parse(body)? {
        Request::Startup(message) => Ok(message),
        other => panic!("not a startup message: {other:?}"),
    }
}

/// Manual 55.7.
const SSL: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x2f";
const GSS: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x30";
const CANCEL: &[u8] = b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\x12\x34secr";
const STARTUP: &[u8] = b"\0\0\0\x2b\0\x03\0\0user\0alice\0database\0shop\0options\0\0\0";

#[test]
fn requests_of_the_manual_are_read_and_taken_off_the_input() {
    let read = |mut bytes: &[u8]| {
        let request = Opening::new().read(&mut bytes).map(|request| format!("{request:?}"));
        (request.unwrap(), bytes.len())
    };
    assert_eq!(read(SSL), ("Some(Ssl)".to_owned(), 0));
    assert_eq!(read(GSS), ("Some(GssEnc)".to_owned(), 0));
    let mut input = CANCEL;
    let Some(Request::Cancel(cancel)) = Opening::new().read(&mut input).unwrap() else { panic!("no cancel") };
    assert_eq!((cancel.pid, cancel.key.as_bytes()), (0x1234, &b"secr"[..]));
    let mut input = STARTUP;
    let Some(Request::Startup(message)) = Opening::new().read(&mut input).unwrap() else {
        panic!("no startup")
    };
    assert_eq!(
        (message.version, message.user(), message.database()),
        (Version::V3_0, &b"alice"[..], &b"shop"[..])
    );
    assert_eq!((message.options(), message.application_name()), (Some(&b""[..]), None));
    assert_eq!(message.replication(), Ok(Replication::Off));
    assert!(!message.must_negotiate());
}

#[test]
fn a_packet_cut_off_anywhere_is_waited_for() {
    for packet in [SSL, GSS, CANCEL, STARTUP] {
        for at in 0..packet.len() {
            let (mut opening, mut input) = (Opening::new(), &packet[..at]);
            assert_eq!(opening.read(&mut input), Ok(None), "{at} bytes");
            assert_eq!(input.len(), at, "nothing is taken");
            assert!(opening.read(&mut &packet[..]).unwrap().is_some());
        }
    }
}

/// CVE-2021-23214, CVE-2021-3935, CVE-2021-43766: bytes behind SSLRequest that came before the handshake.
#[test]
fn cve_2021_23214_bytes_behind_a_request_for_encryption_are_refused() {
    for request in [SSL, GSS] {
        for behind in [&b"\0"[..], STARTUP, b"\x16\x03\x01"] {
            // In the same segment.
            let bytes = [request, behind].concat();
            let mut opening = Opening::new();
            assert_eq!(opening.read(&mut bytes.as_slice()), Err(StartupError::DataBeforeAnswer));
            assert_eq!(opening.read(&mut &STARTUP[..]), Err(StartupError::Ended));
            // In a later one, before the answer was sent.
            let mut opening = Opening::new();
            opening.read(&mut &request[..]).unwrap();
            assert_eq!(opening.read(&mut &behind[..]), Err(StartupError::DataBeforeAnswer));
            // Seen at the moment of the answer only, whichever it is.
            for answer in [Answer::Granted, Answer::Refused] {
                let mut opening = Opening::new();
                opening.read(&mut &request[..]).unwrap();
                assert_eq!(opening.answered(answer, behind), Err(StartupError::DataBeforeAnswer));
            }
        }
    }
}

/// CVE-2021-23222, CVE-2021-43767: the same trick on the client's side.
#[test]
fn cve_2021_23222_bytes_behind_the_answer_for_encryption_are_refused() {
    assert_eq!(encryption_answer(b"", b'S'), Ok(None));
    assert_eq!(encryption_answer(b"S", b'S'), Ok(Some(Answer::Granted)));
    assert_eq!(encryption_answer(b"N", b'S'), Ok(Some(Answer::Refused)));
    assert_eq!(encryption_answer(b"G", b'G'), Ok(Some(Answer::Granted)));
    for stuffed in [&b"SR\0\0\0\x08\0\0\0\0"[..], b"NR\0\0\0\x08\0\0\0\0", b"SS"] {
        assert_eq!(encryption_answer(stuffed, b'S'), Err(StartupError::DataBeforeAnswer));
    }
    assert_eq!(encryption_answer(b"E\0\0\0\x10SFATAL\0", b'S'), Err(StartupError::Answer { byte: b'E' }));
    assert_eq!(encryption_answer(b"G", b'S'), Err(StartupError::Answer { byte: b'G' }));
}

/// CVE-2026-6479: requests for encryption without end.
#[test]
fn cve_2026_6479_each_encryption_can_be_requested_once_and_none_inside_another() {
    let mut opening = Opening::new();
    for request in [SSL, GSS] {
        opening.read(&mut &request[..]).unwrap();
        opening.answered(Answer::Refused, b"").unwrap();
    }
    assert_eq!(opening.clone().read(&mut &SSL[..]), Err(StartupError::RequestedAgain));
    assert_eq!(opening.clone().read(&mut &GSS[..]), Err(StartupError::RequestedAgain));
    assert!(matches!(opening.read(&mut &STARTUP[..]), Ok(Some(Request::Startup(_)))));

    let mut opening = Opening::new();
    opening.read(&mut &SSL[..]).unwrap();
    opening.answered(Answer::Granted, b"").unwrap();
    assert_eq!(opening.clone().read(&mut &GSS[..]), Err(StartupError::RequestedAgain));
    assert!(opening.read(&mut &b"\x16\x03\x01\0\0"[..]).is_err(), "no TLS within TLS");
}

#[test]
fn direct_tls_is_known_by_its_first_byte_and_only_there() {
    let mut opening = Opening::new();
    let mut hello = &b"\x16\x03\x01\x02\0"[..];
    assert_eq!(opening.read(&mut hello), Ok(Some(Request::DirectTls)));
    assert_eq!(hello.len(), 5, "the handshake gets all bytes");
    assert_eq!(opening.clone().read(&mut &SSL[..]), Err(StartupError::RequestedAgain));
    assert!(matches!(opening.read(&mut &STARTUP[..]), Ok(Some(Request::Startup(_)))));
    let mut opening = Opening::new();
    opening.read(&mut &SSL[..]).unwrap();
    opening.answered(Answer::Refused, b"").unwrap();
    assert!(matches!(opening.read(&mut &b"\x16\x03\x01\x02"[..]), Err(StartupError::Length { .. })));
}

#[test]
fn lengths_outside_postgresqls_limits_are_refused() {
    for length in [0_u32, 1, 3, 4, 7, 10_005, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] {
        let error = Opening::new().read(&mut &length.to_be_bytes()[..]).unwrap_err();
        assert_eq!(error, StartupError::Length { length });
    }
    assert_eq!(Opening::new().read(&mut &10_004_u32.to_be_bytes()[..]), Ok(None));
}

/// CVE-2012-4575: a name longer than what holds it.
#[test]
fn cve_2012_4575_names_of_any_length_that_fits_the_packet_are_only_bytes() {
    for length in [1, 63, 64, 9_000] {
        let name = vec![0xff; length];
        let body = [b"\0\x03\0\x02user\0u\0database\0", name.as_slice(), b"\0\0"].concat();
        assert_eq!(startup(&body).unwrap().database(), name);
    }
    let body = [b"\0\x03\0\x02user\0", vec![b'x'; 1_000_000].as_slice(), b"\0\0"].concat();
    assert!(matches!(
        Opening::new().read(&mut packet_of(&body).as_slice()),
        Err(StartupError::Length { .. })
    ));
}

#[test]
fn the_layout_of_a_startup_message_is_checked_to_its_last_byte() {
    for wrong in
        [&b""[..], b"user\0", b"user\0a", b"user\0a\0", b"user\0a\0\0x", b"user\0a\0\0\0", b"user\0a\0b\0"]
    {
        let body = [b"\0\x03\0\0", wrong].concat();
        assert!(matches!(startup(&body), Err(StartupError::Malformed(_))), "{wrong:?}");
    }
    assert_eq!(startup(b"\0\x03\0\0\0"), Err(StartupError::NoUser));
    assert_eq!(startup(b"\0\x03\0\0user\0\0\0"), Err(StartupError::NoUser));
    assert_eq!(startup(b"\0\x03\0\0database\0a\0\0"), Err(StartupError::NoUser));
}

/// CVE-2026-107349: an empty name made a loop without end.
#[test]
fn cve_2026_107349_an_empty_name_ends_the_list() {
    assert!(matches!(startup(b"\0\x03\0\0user\0a\0\0b\0\0"), Err(StartupError::Malformed(_))));
    assert_eq!(startup(b"\0\x03\0\0user\0a\0b\0\0\0").unwrap().parameters().count(), 2);
}

#[test]
fn of_a_repeated_parameter_the_last_one_counts() {
    let body = b"\0\x03\0\0user\0a\0user\0b\0replication\0on\0replication\0database\0\0";
    let message = startup(body).unwrap();
    assert_eq!((message.user(), message.database()), (&b"b"[..], &b"b"[..]));
    assert_eq!(message.replication(), Ok(Replication::Logical));
}

#[test]
fn replication_is_a_boolean_or_the_word_database() {
    let of = |value: &[u8]| {
        let body = [b"\0\x03\0\0user\0a\0replication\0", value, b"\0\0"].concat();
        startup(&body).map(|message| message.replication().unwrap())
    };
    for yes in ["true", "TRUE", "t", "yes", "y", "on", "1"] {
        assert_eq!(of(yes.as_bytes()), Ok(Replication::Physical), "{yes}");
    }
    for no in ["false", "f", "no", "n", "of", "OFF", "0"] {
        assert_eq!(of(no.as_bytes()), Ok(Replication::Off), "{no}");
    }
    for wrong in ["", "o", "2", "tru e", "truer", "Database"] {
        assert!(of(wrong.as_bytes()).is_err(), "{wrong}");
    }
}

#[test]
fn versions_other_than_3_0_and_3_2_are_negotiated_or_refused() {
    let of = |minor: u8, more: &[u8]| {
        let body = [b"\0\x03\0", &[minor][..], b"user\0a\0", more, b"\0"].concat();
        let message = startup(&body).unwrap();
        (message.version.spoken(), message.must_negotiate(), message.protocol_options().count())
    };
    assert_eq!(of(0, b""), (Version::V3_0, false, 0));
    assert_eq!(of(1, b""), (Version::V3_0, true, 0), "3.1 is reserved");
    assert_eq!(of(2, b""), (Version::V3_2, false, 0));
    assert_eq!(of(9, b""), (Version::V3_2, true, 0));
    assert_eq!(of(0, b"_pq_.x\x001\0_pq_.y\0\0"), (Version::V3_0, true, 2));
    for body in [&b"\0\x02\0\0user\0a\0\0"[..], b"\0\x04\0\0user\0a\0\0", b"\0\0\0\0\0"] {
        let error = startup(body).unwrap_err();
        assert!(matches!(error, StartupError::Version { .. }));
        assert_eq!(error.sqlstate().to_string(), "0A000");
    }
}

#[test]
fn a_cancel_has_a_key_of_4_to_256_bytes() {
    for (length, fits) in [(0, false), (3, false), (4, true), (32, true), (256, true), (257, false)] {
        let body = [&CANCEL_REQUEST.to_be_bytes()[..], b"\0\0\0\x01", &vec![7; length]].concat();
        let mut opening = Opening::new();
        assert_eq!(opening.read(&mut packet_of(&body).as_slice()).is_ok(), fits, "{length} bytes");
        assert_eq!(opening.read(&mut &SSL[..]), Err(StartupError::Ended), "nothing follows a cancel");
    }
}

#[test]
fn requests_without_parameters_have_none() {
    for request in [SSL, GSS] {
        let longer = packet_of(&[&request[4..], b"\0"].concat());
        assert!(matches!(Opening::new().read(&mut longer.as_slice()), Err(StartupError::Malformed(_))));
    }
    let mut opening = Opening::new();
    assert_eq!(opening.answered(Answer::Refused, b""), Err(StartupError::Ended), "nothing was asked");
}
