//! Which clients may try to come in, and how they prove who they are: lines in the format of `pg_hba.conf` (manual 21.1).
//!
//! The herd file's lines judge a client twice: here by its own address, and at the server by the address of the proxy. As
//! in PostgreSQL the first line that fits decides, and if none does, the client is refused.
//!
//! A proxy knows less than PostgreSQL: not who is a member of which role, not what a host name means today. A line that
//! asks for such a thing, or for a method that is not built, refuses those whom it may be about, and says which line it
//! was; passing over it could let in somebody whom it was to keep out.
//!
//! A certificate is for the user whose name is its common name, unless a line says that its whole subject counts
//! (`clientname=DN`), or which names are which users (`map=`, [`crate::ident`]).
//!
//! Leaves out: `local` lines, which never fit, since clients come over TCP; files that are included. Hazard: a line that
//! is read otherwise than PostgreSQL reads it.

use std::fmt;
use std::net::IpAddr;

use pgherd_core::spec::TlsMode;
use pgherd_pgwire::startup::Replication;

use crate::ident::{Mapped, Maps};
use crate::login::{Asked, Method};
use crate::names::Names;

/// A line that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("hba line {number} (\"{line}\"): {what}")]
pub struct HbaError {
    pub number: usize,
    pub line: String,
    pub what: &'static str,
}

#[derive(Clone, Debug, Default)]
pub struct Hba {
    lines: Vec<Line>,
    maps: Maps,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    number: usize,
    connection: Connection,
    databases: Vec<Word>,
    users: Vec<Word>,
    address: Address,
    verdict: Verdict,
    naming: Naming,
}

/// Whom a certificate is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Naming {
    by_subject: bool,
    /// Without one: for the user of that very name.
    map: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Connection {
    Any,
    Encrypted,
    Clear,
    /// A Unix socket, or GSSAPI: no client of a proxy.
    Never,
}

/// One of several names; in quotes it means nothing but itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Word {
    text: String,
    quoted: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Address {
    All,
    Network {
        base: IpAddr,
        prefix_bits: u8,
    },
    /// A host name, `samehost` or `samenet`.
    Unclear,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// With a certificate besides, or without.
    ScramSha256(ClientCert),
    /// SCRAM, or md5 for those whose passwords are stored for that.
    Md5(ClientCert),
    Cert,
    Reject,
    NotBuilt(String),
}

/// What a client's certificate must be, from less to more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClientCert {
    /// There need not be any.
    Any,
    /// Signed by the authority for clients.
    VerifyCa,
    /// And made for the user.
    VerifyFull,
}

impl ClientCert {
    /// Of every client, whichever line fits.
    pub fn of(mode: TlsMode) -> ClientCert {
        match mode {
            TlsMode::VerifyCa => ClientCert::VerifyCa,
            TlsMode::VerifyFull => ClientCert::VerifyFull,
            _ => ClientCert::Any,
        }
    }
}

/// What a client has shown of itself, as far as it was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// Nobody has asked for one: there is no authority for clients.
    NotAskedFor,
    None,
    Verified(Names),
}

/// How a client came.
#[derive(Clone, Copy, Debug)]
pub struct From<'a> {
    pub address: IpAddr,
    pub encrypted: bool,
    pub certificate: &'a Certificate,
}

/// Does a line speak of this client?
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    No,
    Maybe,
    Yes,
}

impl Hba {
    /// Lines that are empty or comments count, and mean nothing.
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Result<Hba, HbaError> {
        let mut parsed = Vec::new();
        for (at, text) in lines.into_iter().enumerate() {
            let number = at + 1;
            let wrong = |what| HbaError { number, line: text.to_owned(), what };
            let fields = fields(text).map_err(wrong)?;
            if !fields.is_empty() {
                parsed.push(line(number, &fields).map_err(wrong)?);
            }
        }
        Ok(Hba { lines: parsed, maps: Maps::default() })
    }

    /// What `map=` means.
    pub fn mapped_by(self, maps: Maps) -> Hba {
        Hba { maps, ..self }
    }

    /// `least`: what is asked of the certificate of every client.
    pub fn method(&self, asked: &Asked, from: From<'_>, least: ClientCert) -> Method {
        let From { address, encrypted, certificate } = from;
        let address = address.to_canonical();
        for line in &self.lines {
            let fit = line.fits(asked, address, encrypted);
            let Line { number, verdict, naming, .. } = line;
            let (method, wanted) = match (fit, verdict) {
                (Fit::No, _) => continue,
                (Fit::Maybe, _) => {
                    return reject(format!(
                        "hba line {number} asks for what a proxy cannot know: whether it is about this client"
                    ));
                }
                (Fit::Yes, Verdict::ScramSha256(wanted)) => (Method::ScramSha256, *wanted),
                (Fit::Yes, Verdict::Md5(wanted)) => (Method::Md5, *wanted),
                (Fit::Yes, Verdict::Cert) => (Method::Admit, ClientCert::VerifyFull),
                (Fit::Yes, Verdict::Reject) => {
                    let client = Client { asked, address, encrypted };
                    return reject(format!("pg_hba.conf rejects connection for {client}"));
                }
                (Fit::Yes, Verdict::NotBuilt(method)) => {
                    return reject(format!("the proxy does not support \"{method}\" of hba line {number}"));
                }
            };
            // In PostgreSQL's words where it has them.
            return match (wanted.max(least), certificate) {
                (ClientCert::Any, _) | (ClientCert::VerifyCa, Certificate::Verified(_)) => method,
                (ClientCert::VerifyFull, Certificate::Verified(names)) => {
                    match self.judge(naming, names, &asked.user) {
                        Mapped::Yes => method,
                        Mapped::No => {
                            reject(format!("certificate authentication failed for user \"{}\"", asked.user))
                        }
                        Mapped::Unclear(why) => reject(why),
                    }
                }
                (_, Certificate::None) => reject("connection requires a valid client certificate".to_owned()),
                (_, Certificate::NotAskedFor) => reject(format!(
                    "hba line {number} asks for a certificate, and the proxy has no authority to verify it by"
                )),
            };
        }
        reject(format!("no pg_hba.conf entry for {}", Client { asked, address, encrypted }))
    }

    fn judge(&self, naming: &Naming, names: &Names, user: &str) -> Mapped {
        let name = if naming.by_subject { &names.subject } else { &names.common };
        match (name, &naming.map) {
            (None, _) => Mapped::No,
            (Some(name), Some(map)) => self.maps.judge(map, name, user),
            (Some(name), None) if name == user => Mapped::Yes,
            (Some(_), None) => Mapped::No,
        }
    }
}

fn reject(message: String) -> Method {
    Method::Reject { message }
}

/// As PostgreSQL describes a client whom it refuses.
struct Client<'a> {
    asked: &'a Asked,
    address: IpAddr,
    encrypted: bool,
}

impl fmt::Display for Client<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Client { asked, address, encrypted } = self;
        let encryption = if *encrypted { "SSL encryption" } else { "no encryption" };
        match asked.replication {
            Replication::Physical => write!(f, "replication connection from host \"{address}\"")?,
            _ => write!(f, "host \"{address}\"")?,
        }
        write!(f, ", user \"{}\"", asked.user)?;
        if asked.replication != Replication::Physical {
            write!(f, ", database \"{}\"", asked.database)?;
        }
        write!(f, ", {encryption}")
    }
}

impl Line {
    fn fits(&self, asked: &Asked, address: IpAddr, encrypted: bool) -> Fit {
        let connection = match self.connection {
            Connection::Any => Fit::Yes,
            Connection::Encrypted if encrypted => Fit::Yes,
            Connection::Clear if !encrypted => Fit::Yes,
            _ => Fit::No,
        };
        let best =
            |words: &[Word], fits: &dyn Fn(&Word) -> Fit| words.iter().map(fits).max().unwrap_or(Fit::No);
        let database = best(&self.databases, &|word| word.is_database(asked));
        let user = best(&self.users, &|word| word.is_user(&asked.user));
        connection.min(database).min(user).min(self.address.contains(address))
    }
}

impl Word {
    fn is_database(&self, asked: &Asked) -> Fit {
        let physical = asked.replication == Replication::Physical;
        let fits = match (self.quoted, self.text.as_str()) {
            (false, "replication") => physical,
            // A physical walsender has no database, and "all" is not about it.
            _ if physical => false,
            (false, "all") => true,
            (false, "sameuser") => asked.database == asked.user,
            (false, "samerole" | "samegroup") => return Fit::Maybe,
            (false, text) if text.starts_with('@') => return Fit::Maybe,
            // As of PostgreSQL 16 in quotes as well.
            (_, text) if text.starts_with('/') => return Fit::Maybe,
            (_, text) => text == asked.database,
        };
        if fits { Fit::Yes } else { Fit::No }
    }

    fn is_user(&self, user: &str) -> Fit {
        let fits = match (self.quoted, self.text.as_str()) {
            (false, "all") => true,
            (false, text) if text.starts_with(['+', '@']) => return Fit::Maybe,
            (_, text) if text.starts_with('/') => return Fit::Maybe,
            (_, text) => text == user,
        };
        if fits { Fit::Yes } else { Fit::No }
    }
}

impl Address {
    fn contains(&self, address: IpAddr) -> Fit {
        let fits = match self {
            Address::All => true,
            Address::Unclear => return Fit::Maybe,
            Address::Network { base, prefix_bits } => match (base, address) {
                (IpAddr::V4(base), IpAddr::V4(address)) => {
                    let mask = u32::MAX.checked_shl(32 - u32::from(*prefix_bits)).unwrap_or(0);
                    u32::from(*base) & mask == u32::from(address) & mask
                }
                (IpAddr::V6(base), IpAddr::V6(address)) => {
                    let mask = u128::MAX.checked_shl(128 - u32::from(*prefix_bits)).unwrap_or(0);
                    u128::from(*base) & mask == u128::from(address) & mask
                }
                _ => false,
            },
        };
        if fits { Fit::Yes } else { Fit::No }
    }
}

fn line(number: usize, fields: &[Vec<Word>]) -> Result<Line, &'static str> {
    let connection = match single(&fields[0])? {
        "local" | "hostgssenc" => Connection::Never,
        "host" | "hostnogssenc" => Connection::Any,
        "hostssl" => Connection::Encrypted,
        "hostnossl" => Connection::Clear,
        _ => return Err("it must begin with local, host, hostssl or hostnossl"),
    };
    let lacks = "it lacks fields: type, database, user, address (not for local), method";
    let (databases, users) = (fields.get(1).ok_or(lacks)?.clone(), fields.get(2).ok_or(lacks)?.clone());
    let mut rest = fields.get(3..).ok_or(lacks)?.iter();
    let address = if single(&fields[0])? == "local" {
        Address::All
    } else {
        let text = single(rest.next().ok_or(lacks)?)?;
        let mask = rest.as_slice().first().and_then(|field| single(field).ok()?.parse::<IpAddr>().ok());
        if mask.is_some() {
            rest.next();
        }
        address(text, mask)?
    };
    let method = single(rest.next().ok_or(lacks)?)?;
    let options: Vec<&str> = rest.filter_map(|field| single(field).ok()).collect();
    let value =
        |name: &str| options.iter().rev().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    let wanted = match value("clientcert") {
        None => ClientCert::Any,
        Some(_) if connection != Connection::Encrypted => {
            return Err("clientcert needs a line of type hostssl");
        }
        Some("verify-ca") if method != "cert" => ClientCert::VerifyCa,
        Some("verify-full") => ClientCert::VerifyFull,
        Some(_) => return Err("clientcert takes verify-ca or verify-full, and the latter with method cert"),
    };
    let by_subject = match value("clientname") {
        None => false,
        Some(_) if connection != Connection::Encrypted => {
            return Err("clientname needs a line of type hostssl");
        }
        Some("CN") => false,
        Some("DN") => true,
        Some(_) => return Err("clientname takes CN or DN"),
    };
    let verdict = match method {
        "reject" => Verdict::Reject,
        "cert" if connection != Connection::Encrypted => {
            return Err("method cert needs a line of type hostssl");
        }
        "cert" => Verdict::Cert,
        // PostgreSQL refuses the line, and with it the file.
        "scram-sha-256" | "md5" if value("map").is_some() => {
            return Err("map is no option of a method that asks for a password");
        }
        "scram-sha-256" => Verdict::ScramSha256(wanted),
        "md5" => Verdict::Md5(wanted),
        method => Verdict::NotBuilt(method.to_owned()),
    };
    let naming = Naming { by_subject, map: value("map").map(str::to_owned) };
    Ok(Line { number, connection, databases, users, address, verdict, naming })
}

fn single(field: &[Word]) -> Result<&str, &'static str> {
    match field {
        [word] => Ok(&word.text),
        _ => Err("only databases and users may be lists"),
    }
}

fn address(text: &str, mask: Option<IpAddr>) -> Result<Address, &'static str> {
    let (base, bits) = match text.split_once('/') {
        _ if text == "all" => return Ok(Address::All),
        Some((base, bits)) => (base, Some(bits)),
        None => (text, None),
    };
    let Ok(base) = base.parse::<IpAddr>() else { return Ok(Address::Unclear) };
    let widest = if base.is_ipv4() { 32 } else { 128 };
    let prefix_bits = match (bits, mask) {
        (Some(bits), None) => bits.parse().ok().filter(|bits| *bits <= widest),
        (None, Some(IpAddr::V4(mask))) if base.is_ipv4() => prefix(u32::from(mask).into(), 32),
        (None, Some(IpAddr::V6(mask))) if base.is_ipv6() => prefix(mask.into(), 128),
        _ => None,
    };
    Ok(Address::Network { base, prefix_bits: prefix_bits.ok_or("its address lacks a valid netmask")? })
}

/// Of a netmask without holes.
fn prefix(mask: u128, width: u32) -> Option<u8> {
    let shifted = mask << (128 - width);
    let ones = shifted.leading_ones();
    let whole = if ones == 128 { u128::MAX } else { !(u128::MAX >> ones) };
    (shifted == whole).then_some(ones as u8)
}

/// Splits as PostgreSQL does (`next_token` in `hba.c`): blanks separate fields, commas words, quotes hold together, `#`
/// begins a comment.
fn fields(text: &str) -> Result<Vec<Vec<Word>>, &'static str> {
    let mut fields: Vec<Vec<Word>> = Vec::new();
    let mut word: Option<Word> = None;
    let (mut in_quotes, mut list_goes_on) = (false, false);
    let mut end_word = |word: &mut Option<Word>, list_goes_on: &mut bool| {
        if let Some(word) = word.take() {
            match fields.last_mut() {
                Some(field) if *list_goes_on => field.push(word),
                _ => fields.push(vec![word]),
            }
            *list_goes_on = false;
        }
    };
    for c in text.chars() {
        match c {
            '"' => {
                in_quotes = !in_quotes;
                word.get_or_insert(Word { text: String::new(), quoted: false }).quoted = true;
            }
            '#' if !in_quotes => break,
            ',' if !in_quotes => {
                end_word(&mut word, &mut list_goes_on);
                list_goes_on = true;
            }
            c if c.is_whitespace() && !in_quotes => end_word(&mut word, &mut list_goes_on),
            c => word.get_or_insert(Word { text: String::new(), quoted: false }).text.push(c),
        }
    }
    if in_quotes {
        return Err("a quote does not end");
    }
    end_word(&mut word, &mut list_goes_on);
    Ok(fields)
}

#[cfg(test)]
mod tests;
