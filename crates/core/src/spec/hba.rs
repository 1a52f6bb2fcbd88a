//! One line of `pg_hba.conf`, as the herd file gives it: PostgreSQL's whole grammar, less what would open a
//! door that pgherd promises to keep shut.
//!
//! pgherd's own lines stand before these, so no line here can lock it out. Lines are kept as they were
//! written; a line that does not parse would make PostgreSQL keep the old file at a reload and refuse to
//! start at the next start, which is why the grammar is checked to the end.

use core::net::IpAddr;
use std::fmt;
use std::ops::Range;

use super::nearest::nearest;

/// A line that PostgreSQL takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HbaLine {
    pub connection: Connection,
    pub databases: Vec<String>,
    pub users: Vec<String>,
    pub method: &'static str,
    /// Of the lines of `pg_ident.conf` that say whom a name is for, and where the option stands.
    pub map: Option<(String, Range<usize>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    Local,
    Host,
    HostSsl,
    HostNoSsl,
    HostGssEnc,
    HostNoGssEnc,
}

impl Connection {
    const WORDS: [(&'static str, Connection); 6] = [
        ("local", Connection::Local),
        ("host", Connection::Host),
        ("hostssl", Connection::HostSsl),
        ("hostnossl", Connection::HostNoSsl),
        ("hostgssenc", Connection::HostGssEnc),
        ("hostnogssenc", Connection::HostNoGssEnc),
    ];
}

/// What is wrong, and where in the line (in bytes).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HbaError {
    pub at: Range<usize>,
    pub wrong: HbaWrong,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HbaWrong {
    Empty,
    LineBreak,
    Continued,
    QuoteOpen,
    Missing {
        what: &'static str,
    },
    UnknownType {
        word: String,
    },
    UnknownMethod {
        word: String,
    },
    ManyWords {
        what: &'static str,
    },
    LooseComma,
    Replication,
    FileReference {
        word: String,
    },
    RegularExpression {
        why: String,
    },
    OwnRole {
        word: String,
    },
    Address {
        word: String,
        why: &'static str,
    },
    Mask {
        word: String,
    },
    MethodForConnection {
        method: &'static str,
        needs: &'static str,
    },
    MethodRefused {
        method: &'static str,
        why: &'static str,
    },
    OptionNotPair {
        word: String,
    },
    UnknownOption {
        name: String,
        method: &'static str,
        meant: Option<&'static str>,
    },
    OptionValue {
        name: &'static str,
        takes: &'static str,
    },
    OptionMissing {
        method: &'static str,
        name: &'static str,
    },
    UnknownMap {
        name: String,
    },
    OwnMap {
        word: String,
    },
    NotInVersion {
        what: &'static str,
        first: u16,
    },
    /// Of a line of `pg_ident.conf`.
    NoMapping {
        lacks: &'static str,
    },
    MoreThanMapping,
    NoGroup,
}

impl fmt::Display for HbaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.wrong {
            HbaWrong::Empty => write!(f, "the line is empty or a comment"),
            HbaWrong::LineBreak => {
                write!(f, "the line holds a line break, or a letter that looks like a blank and is none")
            }
            HbaWrong::Continued => {
                write!(f, "the backslash at the end of the line joins the next line to it, even in a comment")
            }
            HbaWrong::QuoteOpen => write!(f, "the quote is not closed"),
            HbaWrong::Missing { what } => write!(f, "the line ends before {what}"),
            HbaWrong::UnknownType { word } => write!(f, "\"{word}\" is not a type of connection"),
            HbaWrong::UnknownMethod { word } => write!(f, "\"{word}\" is not a method of authentication"),
            HbaWrong::ManyWords { what } => write!(f, "{what} is one word, not a list"),
            HbaWrong::LooseComma => {
                write!(f, "a comma stands beside a blank; a list is written without blanks")
            }
            HbaWrong::Replication => write!(f, "replication connections are admitted by pgherd alone"),
            HbaWrong::FileReference { word } => {
                write!(f, "\"{word}\" refers to a file, which would have to be the same on every host")
            }
            HbaWrong::RegularExpression { why } => write!(f, "{why}"),
            HbaWrong::OwnRole { word } => {
                write!(f, "\"{word}\" is one of pgherd's own roles, which it admits itself")
            }
            HbaWrong::Address { word, why } => write!(f, "\"{word}\" is not an address: {why}"),
            HbaWrong::Mask { word } => write!(f, "\"{word}\" is not a network mask of the address before it"),
            HbaWrong::MethodForConnection { method, needs } => {
                write!(f, "method {method} needs a line of type {needs}")
            }
            HbaWrong::MethodRefused { method, why } => write!(f, "method {method} is refused: {why}"),
            HbaWrong::OptionNotPair { word } => write!(f, "\"{word}\" is not of the form name=value"),
            HbaWrong::UnknownOption { name, method, .. } => {
                write!(f, "method {method} has no option \"{name}\"")
            }
            HbaWrong::OptionValue { name, takes } => write!(f, "option {name} takes {takes}"),
            HbaWrong::OptionMissing { method, name } => write!(f, "method {method} needs the option {name}"),
            HbaWrong::UnknownMap { name } => write!(f, "no line of ident belongs to the map \"{name}\""),
            HbaWrong::OwnMap { word } => write!(f, "\"{word}\" is one of pgherd's own maps"),
            HbaWrong::NotInVersion { what, first } => write!(f, "{what} exists from PostgreSQL {first}"),
            HbaWrong::NoMapping { lacks } => write!(f, "the line ends before {lacks}"),
            HbaWrong::MoreThanMapping => write!(f, "a mapping ends with the role"),
            HbaWrong::NoGroup => {
                write!(f, "\\1 needs a group, and the expression has no group that is there exactly once")
            }
        }
    }
}

impl std::error::Error for HbaError {}

impl HbaError {
    pub fn hint(&self) -> Option<String> {
        match &self.wrong {
            HbaWrong::Empty | HbaWrong::Missing { .. } => Some(
                "a line is: type database user address method, as in \"host all all 10.0.0.0/8 scram-sha-256\""
                    .to_owned(),
            ),
            HbaWrong::UnknownType { word } => {
                let words = Connection::WORDS.map(|(word, _)| word);
                Some(did_you_mean(nearest(word, words), &words))
            }
            HbaWrong::UnknownMethod { word } => {
                let offered: Vec<&str> =
                    METHODS.iter().filter(|method| method.refused.is_none()).map(|method| method.name).collect();
                Some(did_you_mean(nearest(word, offered.iter().copied()), &offered))
            }
            HbaWrong::UnknownOption { meant: Some(meant), .. } => Some(format!("did you mean \"{meant}\"?")),
            HbaWrong::MethodRefused { .. } => Some("use scram-sha-256".to_owned()),
            HbaWrong::Address { .. } => Some(
                "an address is all, samehost, samenet, 192.0.2.0/24, 2001:db8::/32, or the name of a host".to_owned(),
            ),
            HbaWrong::NoMapping { .. } => Some(
                "a line is: map name role, as in 'people \"CN=Anna,O=Shop\" anna', or 'people /^(.*)@example\\.com$ \\1'"
                    .to_owned(),
            ),
            HbaWrong::ManyWords { .. } => Some("in quotes commas are part of the word".to_owned()),
            HbaWrong::UnknownMap { .. } => Some("add it to [postgres]: ident = [\"people anna@example.com anna\"]".to_owned()),
            HbaWrong::NoGroup => Some(
                "a group for \\1 stands by itself, as in ^(.*)@example\\.com$, and is neither counted nor one of several".to_owned(),
            ),
            HbaWrong::FileReference { .. } => Some("list the names in the line, separated by commas".to_owned()),
            _ => None,
        }
    }
}

fn did_you_mean(meant: Option<&str>, all: &[&str]) -> String {
    match meant {
        Some(meant) => format!("did you mean \"{meant}\"?"),
        None => format!("there are {}", all.join(", ")),
    }
}

struct Method {
    name: &'static str,
    first_version: u16,
    refused: Option<&'static str>,
    /// `None`: on every type of line.
    only: Option<(&'static [Connection], &'static str)>,
    options: &'static [(&'static str, Takes)],
    required: &'static [&'static str],
}

#[derive(Clone, Copy)]
enum Takes {
    Text,
    Zero1,
    Number,
    Words(&'static [&'static str], &'static str),
    Map,
}

const TCP: Option<(&[Connection], &str)> = Some((
    &[
        Connection::Host,
        Connection::HostSsl,
        Connection::HostNoSsl,
        Connection::HostGssEnc,
        Connection::HostNoGssEnc,
    ],
    "host",
));
const PLAIN: Method =
    Method { name: "", first_version: 14, refused: None, only: None, options: &[], required: &[] };

const METHODS: &[Method] = &[
    Method { name: "scram-sha-256", ..PLAIN },
    Method { name: "md5", ..PLAIN },
    Method { name: "reject", ..PLAIN },
    Method {
        name: "cert",
        only: Some((&[Connection::HostSsl], "hostssl")),
        options: &[("map", Takes::Map)],
        ..PLAIN
    },
    Method {
        name: "peer",
        only: Some((&[Connection::Local], "local")),
        options: &[("map", Takes::Map)],
        ..PLAIN
    },
    Method {
        name: "gss",
        only: TCP,
        options: &[("include_realm", Takes::Zero1), ("krb_realm", Takes::Text), ("map", Takes::Map)],
        ..PLAIN
    },
    Method {
        name: "ldap",
        options: &[
            ("ldapbasedn", Takes::Text),
            ("ldapbinddn", Takes::Text),
            ("ldapbindpasswd", Takes::Text),
            ("ldapport", Takes::Number),
            ("ldapprefix", Takes::Text),
            ("ldapscheme", Takes::Words(&["ldap", "ldaps"], "ldap or ldaps")),
            ("ldapsearchattribute", Takes::Text),
            ("ldapsearchfilter", Takes::Text),
            ("ldapserver", Takes::Text),
            ("ldapsuffix", Takes::Text),
            ("ldaptls", Takes::Zero1),
            ("ldapurl", Takes::Text),
        ],
        ..PLAIN
    },
    Method {
        name: "radius",
        options: &[
            ("radiusidentifiers", Takes::Text),
            ("radiusports", Takes::Text),
            ("radiussecrets", Takes::Text),
            ("radiusservers", Takes::Text),
        ],
        required: &["radiusservers", "radiussecrets"],
        ..PLAIN
    },
    Method {
        name: "pam",
        options: &[("pam_use_hostname", Takes::Zero1), ("pamservice", Takes::Text)],
        ..PLAIN
    },
    Method {
        name: "oauth",
        first_version: 18,
        options: &[
            ("delegate_ident_mapping", Takes::Zero1),
            ("issuer", Takes::Text),
            ("map", Takes::Map),
            ("scope", Takes::Text),
            ("validator", Takes::Text),
        ],
        required: &["issuer", "scope"],
        ..PLAIN
    },
    Method { name: "trust", refused: Some("it lets everyone in who reaches the port"), ..PLAIN },
    Method { name: "password", refused: Some("it sends passwords in the clear"), ..PLAIN },
    Method {
        name: "ident",
        refused: Some("it believes what the client's host says about its users"),
        ..PLAIN
    },
    Method { name: "sspi", refused: Some("it exists on Windows only"), ..PLAIN },
    Method { name: "bsd", refused: Some("it exists on OpenBSD only"), ..PLAIN },
];

/// Options of every method on a `hostssl` line.
const CERTIFICATE_OPTIONS: &[(&str, Takes)] = &[
    ("clientcert", Takes::Words(&["verify-ca", "verify-full"], "verify-ca or verify-full")),
    ("clientname", Takes::Words(&["CN", "DN"], "CN or DN")),
];

/// One field: its tokens (a list is separated by commas) and where it stands.
pub(super) struct Field {
    pub(super) tokens: Vec<Token>,
    pub(super) at: Range<usize>,
}

pub(super) struct Token {
    pub(super) text: String,
    /// A quoted keyword is a name.
    pub(super) quoted: bool,
    pub(super) at: Range<usize>,
}

impl HbaLine {
    pub fn parse(line: &str, version: Option<u16>) -> Result<HbaLine, HbaError> {
        let mut fields = split(line)?.into_iter();
        let end = line.trim_end().len()..line.len();
        let missing = |what| HbaError { at: end.clone(), wrong: HbaWrong::Missing { what } };
        let first = fields.next().ok_or(HbaError { at: 0..line.len(), wrong: HbaWrong::Empty })?;
        let word = single(&first, "the type of connection")?;
        let connection = Connection::WORDS.iter().find(|(name, _)| *name == word.text).map(|(_, it)| *it);
        let connection =
            connection.ok_or_else(|| wrong(word, HbaWrong::UnknownType { word: word.text.clone() }))?;

        let databases = fields.next().ok_or_else(|| missing("the database"))?;
        for token in &databases.tokens {
            check_name(token, version, "database")?;
            if token.text == "replication" {
                return Err(wrong(token, HbaWrong::Replication));
            }
        }
        let users = fields.next().ok_or_else(|| missing("the user"))?;
        for token in &users.tokens {
            check_name(token, version, "user")?;
            let name = token.text.strip_prefix('+').unwrap_or(&token.text);
            if name.starts_with("pgherd") {
                return Err(wrong(token, HbaWrong::OwnRole { word: name.to_owned() }));
            }
        }

        let mut next = fields.next();
        if connection != Connection::Local {
            let address = next.ok_or_else(|| missing("the address"))?;
            let address = single(&address, "the address")?;
            let wants_mask = check_address(address)?;
            next = fields.next();
            if let Some(address) = wants_mask {
                let mask = next.ok_or_else(|| missing("the network mask or prefix length"))?;
                let mask = single(&mask, "the network mask")?;
                let fits = mask.text.parse::<IpAddr>().is_ok_and(|mask| is_mask_of(mask, address));
                if !fits {
                    return Err(wrong(mask, HbaWrong::Mask { word: mask.text.clone() }));
                }
                next = fields.next();
            }
        }

        let method = next.ok_or_else(|| missing("the method"))?;
        let word = single(&method, "the method")?;
        let method = check_method(word, connection, version)?;
        let (mut given, mut map) = (Vec::new(), None);
        for field in fields {
            let (name, of_map) = check_option(&field, method, connection)?;
            given.push(name);
            // As in PostgreSQL the last one counts.
            map = of_map.or(map);
        }
        // Search needs a place to search; anything else is a bind by prefix, suffix or URL.
        let required = method.required.iter().copied().chain((method.name == "ldap").then_some("ldapserver"));
        for name in required {
            let by_url = name == "ldapserver" && given.contains(&"ldapurl");
            if !given.contains(&name) && !by_url {
                return Err(wrong(word, HbaWrong::OptionMissing { method: method.name, name }));
            }
        }
        let texts = |field: Field| field.tokens.into_iter().map(|token| token.text).collect();
        Ok(HbaLine { connection, databases: texts(databases), users: texts(users), method: method.name, map })
    }
}

pub(super) fn wrong(token: &Token, wrong: HbaWrong) -> HbaError {
    HbaError { at: token.at.clone(), wrong }
}

pub(super) fn single<'a>(field: &'a Field, what: &'static str) -> Result<&'a Token, HbaError> {
    match field.tokens.as_slice() {
        [token] => Ok(token),
        _ => Err(HbaError { at: field.at.clone(), wrong: HbaWrong::ManyWords { what } }),
    }
}

/// PostgreSQL's words: separated by blanks, a list by commas, quotes anywhere in a word keep both. PostgreSQL
/// takes some blanks beside a comma and means different things by them; none are taken here.
pub(super) fn split(line: &str) -> Result<Vec<Field>, HbaError> {
    let strange =
        |letter: char| (letter.is_control() || letter.is_whitespace()) && !matches!(letter, ' ' | '\t');
    if let Some((at, found)) = line.char_indices().find(|(_, letter)| strange(*letter)) {
        return Err(HbaError { at: at..at + found.len_utf8(), wrong: HbaWrong::LineBreak });
    }
    let text = line.trim_end();
    if text.ends_with('\\') {
        return Err(HbaError { at: text.len() - 1..text.len(), wrong: HbaWrong::Continued });
    }
    let mut fields: Vec<Field> = Vec::new();
    let mut letters = line.char_indices().peekable();
    let mut joined = false;
    while let Some(&(start, letter)) = letters.peek() {
        match letter {
            '#' => break,
            ' ' | '\t' if joined => {
                return Err(HbaError { at: start - 1..start, wrong: HbaWrong::LooseComma });
            }
            ' ' | '\t' => {
                letters.next();
                continue;
            }
            ',' => return Err(HbaError { at: start..start + 1, wrong: HbaWrong::LooseComma }),
            _ => {}
        }
        let (mut text, mut quoted, mut open, mut end) = (String::new(), false, None, start);
        while let Some(&(at, letter)) = letters.peek() {
            if open.is_none() && matches!(letter, ' ' | '\t' | ',' | '#') {
                break;
            }
            letters.next();
            end = at + letter.len_utf8();
            if letter != '"' {
                text.push(letter);
                continue;
            }
            let doubled = open.is_some() && letters.peek().is_some_and(|(_, next)| *next == '"');
            if doubled {
                text.push('"');
                letters.next();
            } else if open.take().is_none() {
                open = Some(at);
                quoted = true;
            }
        }
        if let Some(at) = open {
            return Err(HbaError { at: at..line.len(), wrong: HbaWrong::QuoteOpen });
        }
        let token = Token { text, quoted, at: start..end };
        match fields.last_mut() {
            Some(field) if joined => {
                field.at.end = end;
                field.tokens.push(token);
            }
            _ => fields.push(Field { tokens: vec![token], at: start..end }),
        }
        joined = letters.next_if(|(_, next)| *next == ',').is_some();
    }
    if joined {
        let end = line.trim_end().len();
        return Err(HbaError { at: end.saturating_sub(1)..end, wrong: HbaWrong::LooseComma });
    }
    Ok(fields)
}

fn check_name(token: &Token, version: Option<u16>, what: &'static str) -> Result<(), HbaError> {
    if token.quoted {
        return Ok(());
    }
    if token.text.starts_with('@') {
        return Err(wrong(token, HbaWrong::FileReference { word: token.text.clone() }));
    }
    if let Some(expression) = token.text.strip_prefix('/') {
        if version.is_some_and(|version| version < 16) {
            return Err(wrong(
                token,
                HbaWrong::NotInVersion { what: "a regular expression in pg_hba.conf", first: 16 },
            ));
        }
        if expression.is_empty() {
            let why = format!("the regular expression for the {what} is empty");
            return Err(wrong(token, HbaWrong::RegularExpression { why }));
        }
    }
    Ok(())
}

/// An address that needs a mask in the next field is given back.
fn check_address(token: &Token) -> Result<Option<IpAddr>, HbaError> {
    let refuse = |why| Err(wrong(token, HbaWrong::Address { word: token.text.clone(), why }));
    if !token.quoted && matches!(token.text.as_str(), "all" | "samehost" | "samenet") {
        return Ok(None);
    }
    if let Some((address, prefix)) = token.text.split_once('/') {
        let Ok(address) = address.parse::<IpAddr>() else {
            return refuse("what stands before the slash is no IP address");
        };
        let most = if address.is_ipv4() { 32 } else { 128 };
        let digits = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        return match prefix.parse::<u8>() {
            Ok(prefix) if digits && prefix <= most => Ok(None),
            _ if address.is_ipv4() => refuse("the prefix length of IPv4 is 0 to 32"),
            _ => refuse("the prefix length of IPv6 is 0 to 128"),
        };
    }
    if let Ok(address) = token.text.parse::<IpAddr>() {
        return Ok(Some(address));
    }
    let host = token.text.strip_prefix('.').unwrap_or(&token.text);
    if !super::is_host_name(host) {
        return refuse("neither an IP address nor the name of a host");
    }
    Ok(None)
}

fn is_mask_of(mask: IpAddr, address: IpAddr) -> bool {
    match (mask, address) {
        (IpAddr::V4(mask), IpAddr::V4(_)) => u32::from(mask).leading_ones() == u32::from(mask).count_ones(),
        (IpAddr::V6(mask), IpAddr::V6(_)) => u128::from(mask).leading_ones() == u128::from(mask).count_ones(),
        _ => false,
    }
}

fn check_method(
    word: &Token,
    connection: Connection,
    version: Option<u16>,
) -> Result<&'static Method, HbaError> {
    let Some(method) = METHODS.iter().find(|method| method.name == word.text) else {
        return Err(wrong(word, HbaWrong::UnknownMethod { word: word.text.clone() }));
    };
    if let Some(why) = method.refused {
        return Err(wrong(word, HbaWrong::MethodRefused { method: method.name, why }));
    }
    if version.is_some_and(|version| version < method.first_version) {
        let (what, first) = (method.name, method.first_version);
        return Err(wrong(word, HbaWrong::NotInVersion { what, first }));
    }
    if let Some((_, needs)) = method.only.filter(|(connections, _)| !connections.contains(&connection)) {
        return Err(wrong(word, HbaWrong::MethodForConnection { method: method.name, needs }));
    }
    Ok(method)
}

/// The option's name, and the map that it names, if it is that one.
type Given = (&'static str, Option<(String, Range<usize>)>);

fn check_option(field: &Field, method: &Method, connection: Connection) -> Result<Given, HbaError> {
    // PostgreSQL reads a list here as several options; the value itself may hold commas only in quotes.
    let token = single(field, "an option")?;
    let Some((name, value)) = token.text.split_once('=') else {
        return Err(wrong(token, HbaWrong::OptionNotPair { word: token.text.clone() }));
    };
    let certificate = if connection == Connection::HostSsl { CERTIFICATE_OPTIONS } else { &[] };
    let known = || method.options.iter().chain(certificate);
    let Some((name, takes)) = known().find(|(known, _)| *known == name) else {
        let meant = nearest(name, known().map(|(name, _)| *name));
        let name = name.to_owned();
        return Err(wrong(token, HbaWrong::UnknownOption { name, method: method.name, meant }));
    };
    let refuse = |takes| Err(wrong(token, HbaWrong::OptionValue { name, takes }));
    if method.name == "cert" && *name == "clientcert" && value != "verify-full" {
        return refuse("verify-full with method cert");
    }
    match takes {
        Takes::Map if value.is_empty() => refuse("the name of a map"),
        Takes::Map if value.starts_with("pgherd") => {
            Err(wrong(token, HbaWrong::OwnMap { word: value.to_owned() }))
        }
        Takes::Map => Ok((name, Some((value.to_owned(), token.at.clone())))),
        Takes::Zero1 if !matches!(value, "0" | "1") => refuse("0 or 1"),
        Takes::Number if value.parse::<u16>().is_err() => refuse("a port"),
        Takes::Words(words, takes) if !words.contains(&value) => refuse(takes),
        Takes::Text if value.is_empty() => refuse("a text"),
        _ => Ok((name, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_postgresql_reads_is_read() {
        for line in [
            "local all all scram-sha-256",
            "local  \"all\",b  u1,u2\tpeer # a comment",
            "host all all 10.0.0.0/8 scram-sha-256",
            "host all all 10.0.0.0 255.0.0.0 md5",
            "host all all ::1/128 scram-sha-256",
            "host all all fe80:: ffc0:: reject",
            "hostssl app,sameuser +admins,\"Some One\" samenet cert",
            "hostssl all all all scram-sha-256 clientcert=verify-full clientname=DN",
            "hostnossl all all .example.com reject",
            "hostgssenc all all db-1.example.com gss include_realm=1 krb_realm=EXAMPLE.COM",
            "host all all all ldap ldapserver=ldap.example.net ldapprefix=\"cn=\" ldapsuffix=\", dc=example\"",
            "host all all all ldap ldapurl=\"ldap://ldap.example.net/dc=example?uid?sub\"",
            "host all all all radius radiusservers=10.1.1.1 radiussecrets=\"a,b\"",
            "host all all all pam pamservice=postgresql",
            "host all /^app all scram-sha-256",
        ] {
            assert!(HbaLine::parse(line, Some(16)).is_ok(), "{line}: {:?}", HbaLine::parse(line, Some(16)));
        }
        let line = HbaLine::parse("host a,\"b c\" u 10.0.0.0/8 md5", None).unwrap();
        assert_eq!((line.databases, line.method), (vec!["a".to_owned(), "b c".to_owned()], "md5"));
        let line =
            HbaLine::parse("hostssl all all all cert map=people \"map=the others\" clientname=DN", None)
                .unwrap();
        assert_eq!(line.map, Some(("the others".to_owned(), 36..52)));
    }

    #[test]
    fn each_mistake_is_told_at_its_place() {
        for (line, at, told) in [
            ("", 0..0, "the line is empty"),
            ("  # nothing", 0..11, "the line is empty"),
            ("hots all all all md5", 0..4, "\"hots\" is not a type of connection"),
            ("host all", 8..8, "the line ends before the user"),
            ("host all all scram-sha-256", 26..26, "the line ends before the method"),
            ("host all all 10.0.0.1 scram-sha-256", 22..35, "\"scram-sha-256\" is not a network mask"),
            ("host all all 10.0.0.0/33 md5", 13..24, "the prefix length of IPv4 is 0 to 32"),
            ("host all all 10.0.0.0/ md5", 13..22, "the prefix length of IPv4"),
            ("host all all 10.0.0.0 255.0.255.0 md5", 22..33, "is not a network mask"),
            ("host all all 10.0.0.0 ffff:: md5", 22..28, "is not a network mask"),
            ("host all all 10.0.0/8 md5", 13..21, "no IP address"),
            ("host all all so_me/where md5", 13..24, "no IP address"),
            ("host all all all trust", 17..22, "method trust is refused"),
            ("host all all all password", 17..25, "in the clear"),
            ("host all all all scram", 17..22, "\"scram\" is not a method"),
            ("host all all all peer", 17..21, "method peer needs a line of type local"),
            ("host all all all cert", 17..21, "method cert needs a line of type hostssl"),
            ("local all all gss", 14..17, "method gss needs a line of type host"),
            ("hostssl all all all cert map=", 25..29, "option map takes the name of a map"),
            ("hostssl all all all cert map=pgherd_proxied", 25..43, "one of pgherd's own maps"),
            (
                "hostssl all all all scram-sha-256 clientcert=verify-full map=m",
                57..62,
                "has no option \"map\"",
            ),
            ("host all all all reject # \\", 26..27, "joins the next line"),
            ("hostssl all all all cert clientcert=verify-ca", 25..45, "takes verify-full with method cert"),
            ("hostssl all all all md5 clientcert=1", 24..36, "takes verify-ca or verify-full"),
            ("host all all all md5 clientcert=verify-ca", 21..41, "method md5 has no option"),
            ("host all all all md5 nonsense", 21..29, "not of the form name=value"),
            ("host all all all ldap", 17..21, "method ldap needs the option ldapserver"),
            ("host all all all oauth", 17..22, "oauth exists from PostgreSQL 18"),
            ("host all pgherd_agent all md5", 9..21, "one of pgherd's own roles"),
            ("host @dbs all all md5", 5..9, "refers to a file"),
            ("host all /^app all md5", 9..14, "exists from PostgreSQL 16"),
            ("host a, b all all md5", 6..7, "a comma stands beside a blank"),
            ("host a ,b all all md5", 7..8, "a comma stands beside a blank"),
            ("host a,,b all all md5", 7..8, "a comma stands beside a blank"),
            ("host all all all md5,", 20..21, "a comma stands beside a blank"),
            ("host app,replication x all md5", 9..20, "admitted by pgherd alone"),
            ("host all all\u{a0}all md5", 12..14, "looks like a blank"),
            ("host \"all all all md5", 5..21, "the quote is not closed"),
            ("host,local all all all md5", 0..10, "the type of connection is one word"),
            ("host all all all md5\nhost all all all trust", 20..21, "line break"),
        ] {
            let error = HbaLine::parse(line, Some(15)).expect_err(line);
            assert!(error.to_string().contains(told), "{line}: {error}");
            assert_eq!(error.at, at, "{line}: {error}");
        }
    }
}
