//! Views and builders: golden bytes written by hand from manual 55.7, wrong bodies, round trips.
//!
//! Leaves out framing. Every builder is read back by its view, so that neither can be wrong alone.

use bytes::BytesMut;
use proptest::prelude::*;

use super::build::{self, BindOut, ColumnOut, Report, Severity, Unsendable};
use super::client::{self, ClientMessage, SaslInitial};
use super::server::{Authentication, ServerMessage};
use super::*;
use crate::startup::Version;

fn written(write: impl FnOnce(&mut BytesMut) -> Result<(), Unsendable>) -> Vec<u8> {
    let mut to = BytesMut::from(&b"before"[..]);
    write(&mut to).unwrap();
    to.split_off(6).to_vec()
}

fn plain(write: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    written(|to| {
        write(to);
        Ok(())
    })
}

fn client(message: &[u8]) -> Result<ClientMessage<'_>, Malformed> {
    assert_eq!(message[1..5], (message.len() as u32 - 1).to_be_bytes(), "the length of the test's own bytes");
    ClientMessage::parse(message[0], &message[5..])
}

fn server(message: &[u8]) -> Result<ServerMessage<'_>, Malformed> {
    assert_eq!(message[1..5], (message.len() as u32 - 1).to_be_bytes(), "the length of the test's own bytes");
    ServerMessage::parse(message[0], &message[5..])
}

const BIND: &[u8] = b"B\0\0\0\x1fp\0st\0\0\x02\0\0\0\x01\0\x02\0\0\0\x02ab\xff\xff\xff\xff\0\x01\0\x01";
const PARSE: &[u8] = b"P\0\0\0\x17st\0SELECT $1\0\0\x01\0\0\0\x17";
const ERROR: &[u8] = b"E\0\0\0\x35SERROR\0VERROR\0C42P01\0Mno table\0Dwhich one\0Hlook\0\0";
const ROWS: &[u8] = b"T\0\0\0\x1a\0\x01a\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0";

#[test]
fn golden_bytes_of_what_clients_send() {
    assert_eq!(client(b"Q\0\0\0\x0dSELECT 1\0"), Ok(ClientMessage::Query { text: b"SELECT 1" }));
    let Ok(ClientMessage::Parse(parse)) = client(PARSE) else { panic!("no Parse") };
    assert_eq!((parse.name, parse.text), (&b"st"[..], &b"SELECT $1"[..]));
    assert_eq!(parse.types.iter().collect::<Vec<_>>(), [23]);
    let Ok(ClientMessage::Bind(bind)) = client(BIND) else { panic!("no Bind: {:?}", client(BIND)) };
    assert_eq!((bind.portal, bind.statement), (&b"p"[..], &b"st"[..]));
    assert_eq!(bind.formats.iter().collect::<Vec<_>>(), [Format::Text, Format::Binary]);
    assert_eq!(bind.values.iter().collect::<Vec<_>>(), [Some(&b"ab"[..]), None]);
    assert_eq!(bind.result_formats.iter().collect::<Vec<_>>(), [Format::Binary]);
    let statement = ClientMessage::Describe { target: Target::Statement, name: b"st" };
    assert_eq!(client(b"D\0\0\0\x08Sst\0"), Ok(statement));
    assert_eq!(client(b"C\0\0\0\x06P\0"), Ok(ClientMessage::Close { target: Target::Portal, name: b"" }));
    assert_eq!(client(b"E\0\0\0\x09\0\0\0\0\x07"), Ok(ClientMessage::Execute { portal: b"", max_rows: 7 }));
    assert_eq!(
        client(b"E\0\0\0\x09\0\xff\xff\xff\xff"),
        Ok(ClientMessage::Execute { portal: b"", max_rows: 0 })
    );
    assert_eq!(client(b"S\0\0\0\x04"), Ok(ClientMessage::Sync));
    assert_eq!(client(b"H\0\0\0\x04"), Ok(ClientMessage::Flush));
    assert_eq!(client(b"d\0\0\0\x061\n"), Ok(ClientMessage::CopyData(b"1\n")));
    assert_eq!(client(b"c\0\0\0\x04"), Ok(ClientMessage::CopyDone));
    assert_eq!(client(b"f\0\0\0\x07no\0"), Ok(ClientMessage::CopyFail { reason: b"no" }));
    assert_eq!(client(b"X\0\0\0\x04"), Ok(ClientMessage::Terminate));
    let call = b"F\0\0\0\x16\0\0\x04\xd2\0\x01\0\x01\0\x01\0\0\0\x02xy\0\x01";
    let Ok(ClientMessage::FunctionCall(call)) = client(call) else { panic!("no FunctionCall") };
    assert_eq!((call.function, call.binary_result), (1234, true));
    assert_eq!(call.arguments.iter().collect::<Vec<_>>(), [Some(&b"xy"[..])]);
    let sasl = SaslInitial { mechanism: b"SCRAM-SHA-256", response: Some(b"n,,") };
    assert!(SaslInitial::read(b"SCRAM-SHA-256\0\0\0\0\x03n,,") == Ok(sasl));
    assert!(SaslInitial::read(b"X\0\xff\xff\xff\xff").is_ok_and(|sasl| sasl.response.is_none()));
    assert_eq!(client::password(b"secret\0"), Ok(&b"secret"[..]));
}

#[test]
fn golden_bytes_of_what_servers_send() {
    assert_eq!(server(b"R\0\0\0\x08\0\0\0\0"), Ok(ServerMessage::Authentication(Authentication::Ok)));
    let md5 = Authentication::Md5Password { salt: *b"salt" };
    assert_eq!(server(b"R\0\0\0\x0c\0\0\0\x05salt"), Ok(ServerMessage::Authentication(md5)));
    let sasl = server(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0");
    let Ok(ServerMessage::Authentication(Authentication::Sasl(names))) = sasl else { panic!("{sasl:?}") };
    assert_eq!(names.iter().collect::<Vec<_>>(), [b"SCRAM-SHA-256"]);
    let Ok(ServerMessage::BackendKeyData { pid, key }) = server(b"K\0\0\0\x0c\0\0\0\x2akey!") else {
        panic!()
    };
    assert_eq!((pid, key.as_bytes(), format!("{key:?}").as_str()), (42, &b"key!"[..], "Key(4 bytes)"));
    assert_eq!(server(b"Z\0\0\0\x05E"), Ok(ServerMessage::ReadyForQuery(TransactionStatus::Failed)));
    assert_eq!(server(b"C\0\0\0\x0dSELECT 1\0"), Ok(ServerMessage::CommandComplete { tag: b"SELECT 1" }));
    let set = ServerMessage::ParameterStatus { name: b"TimeZone", value: b"UTC" };
    assert_eq!(server(b"S\0\0\0\x11TimeZone\0UTC\0"), Ok(set));
    let Ok(ServerMessage::ErrorResponse(error)) = server(ERROR) else { panic!("{:?}", server(ERROR)) };
    assert_eq!((error.sqlstate(), error.message()), (SqlState::new(b"42P01"), Some(&b"no table"[..])));
    assert!(!error.is_fatal());
    let notification = ServerMessage::NotificationResponse { pid: 7, channel: b"c", payload: b"" };
    assert_eq!(server(b"A\0\0\0\x0b\0\0\0\x07c\0\0"), Ok(notification));
    let Ok(ServerMessage::RowDescription(rows)) = server(ROWS) else { panic!("{:?}", server(ROWS)) };
    let column = rows.columns().next().unwrap();
    assert_eq!((rows.count(), column.name, column.type_oid, column.type_bytes), (1, &b"a"[..], 23, 4));
    let row = server(b"D\0\0\0\x0f\0\x02\0\0\0\x011\xff\xff\xff\xff");
    let Ok(ServerMessage::DataRow(values)) = row else { panic!("{row:?}") };
    assert_eq!(values.iter().collect::<Vec<_>>(), [Some(&b"1"[..]), None]);
    let copy = server(b"G\0\0\0\x09\0\0\x01\0\0");
    let Ok(ServerMessage::CopyInResponse(copy)) = copy else { panic!("{copy:?}") };
    assert_eq!((copy.overall, copy.columns.count()), (Format::Text, 1));
    assert_eq!(server(b"V\0\0\0\x09\0\0\0\x01x"), Ok(ServerMessage::FunctionCallResponse(Some(b"x"))));
    let version = server(b"v\0\0\0\x12\0\x03\0\0\0\0\0\x01_pq_.\0");
    let Ok(ServerMessage::NegotiateProtocolVersion(version)) = version else { panic!("{version:?}") };
    assert_eq!(version.version, Version::V3_0);
    assert_eq!(version.unknown_options().collect::<Vec<_>>(), [b"_pq_."]);
    for (kind, parsed) in [
        (b'1', ServerMessage::ParseComplete),
        (b'2', ServerMessage::BindComplete),
        (b'3', ServerMessage::CloseComplete),
        (b'n', ServerMessage::NoData),
        (b's', ServerMessage::PortalSuspended),
        (b'I', ServerMessage::EmptyQueryResponse),
        (b'c', ServerMessage::CopyDone),
    ] {
        assert_eq!(ServerMessage::parse(kind, b""), Ok(parsed));
        assert!(ServerMessage::parse(kind, b"x").is_err());
    }
}

#[test]
fn builders_write_the_golden_bytes() {
    let values: [Option<&[u8]>; 2] = [Some(b"ab"), None];
    let formats = [Format::Text, Format::Binary];
    let out = BindOut {
        portal: b"p",
        statement: b"st",
        formats: &formats,
        values: &values,
        result_formats: &formats[1..],
    };
    assert_eq!(written(|to| build::bind(to, &out)), BIND);
    assert_eq!(written(|to| build::parse(to, b"st", b"SELECT $1", &[23])), PARSE);
    let report = Report {
        severity: Severity::Error,
        sqlstate: SqlState::new(b"42P01").unwrap(),
        message: "no table",
        detail: Some("which one"),
        hint: Some("look"),
    };
    assert_eq!(plain(|to| build::error_response(to, &report)), ERROR);
    let column = ColumnOut { name: "a", type_oid: 23, type_bytes: 4 };
    assert_eq!(written(|to| build::row_description(to, &[column])), ROWS);
    assert_eq!(written(|to| build::query(to, b"SELECT 1")), b"Q\0\0\0\x0dSELECT 1\0");
    assert_eq!(written(|to| build::describe(to, Target::Statement, b"st")), b"D\0\0\0\x08Sst\0");
    assert_eq!(written(|to| build::close(to, Target::Portal, b"")), b"C\0\0\0\x06P\0");
    assert_eq!(written(|to| build::execute(to, b"", 7)), b"E\0\0\0\x09\0\0\0\0\x07");
    assert_eq!(written(|to| build::copy_fail(to, b"no")), b"f\0\0\0\x07no\0");
    assert_eq!(plain(build::sync), b"S\0\0\0\x04");
    assert_eq!(plain(build::authentication_ok), b"R\0\0\0\x08\0\0\0\0");
    let sasl = b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0";
    assert_eq!(written(|to| build::authentication_sasl(to, &["SCRAM-SHA-256"])), sasl);
    let key = Key::new(b"key!").unwrap();
    assert_eq!(plain(|to| build::backend_key_data(to, 42, key)), b"K\0\0\0\x0c\0\0\0\x2akey!");
    assert_eq!(plain(|to| build::cancel_request(to, 42, key)), b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x2akey!");
    assert_eq!(plain(build::ssl_request), b"\0\0\0\x08\x04\xd2\x16\x2f");
    let options = [&b"_pq_."[..]];
    assert_eq!(
        written(|to| build::negotiate_protocol_version(to, Version::V3_0, options.into_iter())),
        b"v\0\0\0\x12\0\x03\0\0\0\0\0\x01_pq_.\0"
    );
    assert_eq!(
        written(|to| build::startup_message(to, Version::V3_0, &[(b"user", b"a")])),
        b"\0\0\0\x10\0\x03\0\0user\0a\0\0"
    );
    let ready = plain(|to| build::ready_for_query(to, TransactionStatus::InTransaction));
    assert_eq!(ready, b"Z\0\0\0\x05T");
}

#[test]
fn a_body_cut_off_anywhere_or_longer_by_a_byte_is_refused() {
    for message in [BIND, PARSE, b"E\0\0\0\x09\0\0\0\0\x07", b"D\0\0\0\x08Sst\0", b"Q\0\0\0\x06a\0"] {
        let body = &message[5..];
        assert!(ClientMessage::parse(message[0], body).is_ok());
        for length in 0..body.len() {
            assert!(
                ClientMessage::parse(message[0], &body[..length]).is_err(),
                "{length} bytes of {message:?}"
            );
        }
        let longer = ClientMessage::parse(message[0], &[body, b"\0"].concat()).map(|_| ());
        assert_eq!(longer.unwrap_err().defect, Defect::Trailing { bytes: 1 });
    }
    for message in [ERROR, ROWS, b"A\0\0\0\x0b\0\0\0\x07c\0\0", b"D\0\0\0\x0b\0\x01\0\0\0\x011"] {
        let body = &message[5..];
        assert!(ServerMessage::parse(message[0], body).is_ok());
        for length in 0..body.len() {
            assert!(
                ServerMessage::parse(message[0], &body[..length]).is_err(),
                "{length} bytes of {message:?}"
            );
        }
        assert!(ServerMessage::parse(message[0], &[body, b"\0"].concat()).is_err());
    }
}

/// CVE-2026-6664, inside a message: lengths and numbers that are more than there is.
#[test]
fn cve_2026_6664_lengths_inside_a_message_are_compared_with_what_is_there() {
    for length in [&b"\x7f\xff\xff\xff"[..], b"\x80\0\0\0", b"\xff\xff\xff\xfe", b"\0\0\0\x03"] {
        let bind = [b"\0\0\0\0\0\x01", length, b"ab\0\0"].concat();
        assert!(ClientMessage::parse(b'B', &bind).is_err());
        assert!(ServerMessage::parse(b'D', &[b"\0\x01", length, b"ab"].concat()).is_err());
        assert!(SaslInitial::read(&[b"SCRAM\0", length, b"ab"].concat()).is_err());
        let version = [b"\0\x03\0\0", length, b"a\0"].concat();
        assert!(ServerMessage::parse(b'v', &version).is_err());
    }
    assert!(
        ClientMessage::parse(b'B', b"\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0\x01a\0\0").is_err(),
        "3 formats, 1 value"
    );
    assert!(ClientMessage::parse(b'B', b"\0\0\0\x01\0\x02\0\0\0\0").is_err(), "format 2");
    assert_eq!(client::password(b"\0").unwrap_err().defect, Defect::Value, "an empty password");
}

/// CVE-2026-6666: an error without SQLSTATE; also with a wrong, a repeated or an unknown field, and with
/// none.
#[test]
fn cve_2026_6666_an_error_without_sqlstate_is_still_an_error() {
    let fields = |body: &'static [u8]| match ServerMessage::parse(b'E', body) {
        Ok(ServerMessage::ErrorResponse(fields)) => fields,
        other => panic!("{other:?}"),
    };
    assert_eq!(fields(b"\0").sqlstate(), None);
    assert_eq!(fields(b"SERROR\0Mm\0\0").sqlstate(), None);
    assert_eq!(fields(b"C123\0\0").sqlstate(), None);
    assert_eq!(fields(b"C42P01\0C08P01\0\0").sqlstate(), SqlState::new(b"42P01"));
    assert_eq!(fields(b"?what\0C42P01\0\0").sqlstate(), SqlState::new(b"42P01"));
    assert!(fields(b"SFATAL\0\0").is_fatal());
    assert!(fields("SFATAL\0VPANIC\0\0".as_bytes()).is_fatal());
    assert!(!fields(b"SFATAL\0VERROR\0\0").is_fatal(), "V is not translated, S may be");
    assert!(!fields(b"\0").is_fatal());
}

#[test]
fn the_names_of_a_bind_are_known_before_its_values() {
    let body = &BIND[5..];
    for length in 0..body.len() {
        let names = client::bind_names(&body[..length]).map(|names| (names.portal, names.statement));
        assert_eq!(names, (length >= 5).then_some((&b"p"[..], &b"st"[..])));
    }
}

#[test]
fn a_text_with_a_zero_cannot_smuggle_a_message() {
    let mut to = BytesMut::from(&b"kept"[..]);
    let zero = |message| Err(Unsendable::Zero { message });
    assert_eq!(build::query(&mut to, b"SELECT 1\0Z\0\0\0\x05I"), zero("Query"));
    assert_eq!(build::parameter_status(&mut to, b"a\0b", b""), zero("ParameterStatus"));
    assert_eq!(build::startup_message(&mut to, Version::V3_0, &[(b"user", b"a\0b")]), zero("StartupMessage"));
    let long = [b'x'; 10_001];
    let parameters = [(&b"user"[..], &long[..])];
    let too_long = build::startup_message(&mut to, Version::V3_0, &parameters);
    assert_eq!(too_long, Err(Unsendable::TooLong { message: "StartupMessage" }));
    assert_eq!(build::close(&mut to, Target::Portal, &long), Err(Unsendable::TooLong { message: "Close" }));
    assert_eq!(&to[..], b"kept", "nothing of it was written");
    let report = Report {
        severity: Severity::Fatal,
        sqlstate: SqlState::PROTOCOL_VIOLATION,
        message: "a\0b",
        detail: Some(&"ä".repeat(5_000)),
        hint: None,
    };
    let message = plain(|to| build::error_response(to, &report));
    let Ok(ServerMessage::ErrorResponse(error)) = server(&message) else { panic!("unreadable") };
    assert_eq!(error.message(), Some(&b"a?b"[..]));
    assert_eq!(error.get(b'D').map(<[u8]>::len), Some(Report::MAX_TEXT_BYTES));
    assert!(error.is_fatal());
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(1..=255_u8, 0..40)
}

proptest! {
    #[test]
    fn a_bind_comes_back_as_it_was_written(
        portal in text(),
        statement in text(),
        values in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..30)), 0..20),
        binary in any::<bool>(),
    ) {
        let format = [if binary { Format::Binary } else { Format::Text }];
        let values: Vec<Option<&[u8]>> = values.iter().map(|value| value.as_deref()).collect();
        let out = BindOut {
            portal: &portal,
            statement: &statement,
            formats: &format,
            values: &values,
            result_formats: &[],
        };
        let message = written(|to| build::bind(to, &out));
        let Ok(ClientMessage::Bind(back)) = client(&message) else { panic!("unreadable") };
        prop_assert_eq!((back.portal, back.statement), (&portal[..], &statement[..]));
        prop_assert_eq!(back.values.iter().collect::<Vec<_>>(), values);
        prop_assert_eq!(back.formats.iter().collect::<Vec<_>>(), format);
    }

    #[test]
    fn texts_come_back_as_they_were_written(
        name in text(),
        value in text(),
        types in prop::collection::vec(any::<u32>(), 0..9),
    ) {
        let message = written(|to| build::parse(to, &name, &value, &types));
        let Ok(ClientMessage::Parse(back)) = client(&message) else { panic!("unreadable") };
        prop_assert_eq!((back.name, back.text), (&name[..], &value[..]));
        prop_assert_eq!(back.types.iter().collect::<Vec<_>>(), types);
        let message = written(|to| build::parameter_status(to, &name, &value));
        prop_assert_eq!(server(&message), Ok(ServerMessage::ParameterStatus { name: &name, value: &value }));
    }

    #[test]
    fn hostile_bodies_never_panic(
        kind in any::<u8>(),
        body in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], 0..80),
    ) {
        let read = ClientMessage::parse(kind, &body).map(|message| match message {
            ClientMessage::Bind(bind) => bind.values.iter().flatten().map(<[u8]>::len).sum(),
            _ => 0,
        });
        prop_assert!(read.unwrap_or(0) <= body.len());
        if let Ok(ServerMessage::DataRow(values)) = ServerMessage::parse(kind, &body) {
            prop_assert_eq!(values.iter().count(), values.count());
        }
    }
}
