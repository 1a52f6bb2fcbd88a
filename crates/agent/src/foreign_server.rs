//! A server on whatever host, by a connection string: for a base backup over its replication protocol.
//!
//! Hazard: a password that goes to somebody else. What leaves this host goes over TLS, to whom an authority that was named has signed,
//! or in clear where `sslmode=disable` says so in so many words.

use std::path::PathBuf;
use std::time::Duration;

use pgherd_postgres::Secret;
use pgherd_postgres::base_backup::streamed::{Shape, StreamError};
use pgherd_postgres::replication::{Foreign, Identified, Replication, ReplicationError, Source};
use pgherd_postgres::sql::{TlsError, TlsIdentity};

const CONNECTING: Duration = Duration::from_secs(10);
const USUAL_PORT: u16 = 5432;
/// The only keys of libpq's that mean something here.
const KEYS: &str = "host, port, user, sslmode (disable or verify-full) and sslrootcert";

/// Which server, and how it is reached.
#[derive(Clone)]
pub struct ForeignServer {
    /// A name, an address, or the directory of a socket.
    pub host: String,
    pub port: u16,
    pub role: String,
    pub password: Option<String>,
    /// Whom its certificate has to be signed by; nothing is encrypted without.
    pub authority: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionStringError {
    #[error("\"{part}\" is no key with a value")]
    Part { part: String },
    #[error("a quote has no end")]
    Quote,
    #[error("{key} is not known here")]
    Key { key: String },
    #[error("a password in a command line is read by everybody on this host")]
    Password,
    #[error("{key} is \"{value}\"")]
    Value { key: &'static str, value: String },
    #[error("it has no host")]
    NoHost,
    #[error("nothing says how {host} is to be believed")]
    NotSaid { host: String },
}

impl ConnectionStringError {
    pub fn hint(&self) -> String {
        match self {
            ConnectionStringError::Password => "PGPASSWORD is used".to_owned(),
            ConnectionStringError::NotSaid { .. } => {
                "sslrootcert=FILE names who has signed its certificate; sslmode=disable sends everything in clear".to_owned()
            }
            _ => format!("such as 'host=db1 user=backup sslrootcert=/etc/pgherd/ca.pem'; it may say {KEYS}"),
        }
    }
}

impl ForeignServer {
    pub fn parse(text: &str, password: Option<String>) -> Result<ForeignServer, ConnectionStringError> {
        let (mut host, mut port, mut role) = (None, USUAL_PORT, "postgres".to_owned());
        let (mut mode, mut authority) = (None, None);
        for (key, value) in pairs(text)? {
            let wrong = |key| ConnectionStringError::Value { key, value: value.clone() };
            match key.as_str() {
                "host" if !value.is_empty() => host = Some(value),
                "port" => port = value.parse().ok().filter(|port| *port > 0).ok_or(wrong("port"))?,
                "user" if !value.is_empty() => role = value,
                "sslmode" if value == "disable" || value == "verify-full" => mode = Some(value),
                "sslmode" => return Err(wrong("sslmode")),
                "sslrootcert" if !value.is_empty() => authority = Some(PathBuf::from(value)),
                "password" => return Err(ConnectionStringError::Password),
                _ => return Err(ConnectionStringError::Key { key }),
            }
        }
        let host = host.ok_or(ConnectionStringError::NoHost)?;
        let is_here = host.starts_with('/')
            || host == "localhost"
            || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback());
        match (mode.as_deref(), &authority) {
            (Some("disable"), _) => authority = None,
            (None, None) if is_here => {}
            (_, Some(_)) if !host.starts_with('/') => {}
            _ => return Err(ConnectionStringError::NotSaid { host }),
        }
        Ok(ForeignServer { host, port, role, password, authority })
    }

    pub(crate) async fn reach(self) -> Result<Reached, ForeignServerError> {
        let ForeignServer { host, port, role, password, authority } = self;
        let source = match host.starts_with('/') {
            true => Source::Local { socket: PathBuf::from(host).join(format!(".s.PGSQL.{port}")), role },
            false => {
                let tls = match authority {
                    Some(file) => Some(TlsIdentity::of_authorities(&file).await?),
                    None => None,
                };
                Source::Foreign(Box::new(Foreign {
                    host,
                    port,
                    role,
                    password: password.map(Secret::new),
                    tls,
                }))
            }
        };
        let mut replication = Replication::open(&source, CONNECTING).await.map_err(StreamError::from)?;
        let failed = |error: ReplicationError| StreamError::from(error);
        let identified = replication.identify(CONNECTING).await.map_err(failed)?;
        let shape = Shape::of(&mut replication).await?;
        let archive_mode = replication.show("archive_mode", CONNECTING).await.map_err(failed)?;
        Ok(Reached { replication, identified, shape, archive_mode })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ForeignServerError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl ForeignServerError {
    pub fn hint(&self) -> Option<String> {
        match self {
            ForeignServerError::Tls(_) => Some("sslrootcert is a file of certificates in PEM".to_owned()),
            ForeignServerError::Stream(error) => error.hint().map(str::to_owned),
        }
    }
}

/// A connection to the server that was meant, and what it says of itself.
pub(crate) struct Reached {
    pub(crate) replication: Replication,
    pub(crate) identified: Identified,
    pub(crate) shape: Shape,
    pub(crate) archive_mode: String,
}

/// Keys and values, as libpq reads them: `key = value`, where a value may stand in single quotes, and a backslash
/// takes the next letter as it is.
fn pairs(text: &str) -> Result<Vec<(String, String)>, ConnectionStringError> {
    let mut pairs = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let first = rest.split_whitespace().next().unwrap_or_default();
        let broken = || ConnectionStringError::Part { part: first.to_owned() };
        let (key, after) = rest.split_once('=').ok_or_else(broken)?;
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(broken());
        }
        let after = after.trim_start();
        let quoted = after.starts_with('\'');
        let mut letters = after.char_indices().skip(usize::from(quoted));
        let (mut value, mut end) = (String::new(), None);
        while let Some((at, letter)) = letters.next() {
            match letter {
                '\\' => value.extend(letters.next().map(|(_, letter)| letter)),
                '\'' if quoted => {
                    end = Some(at + 1);
                    break;
                }
                letter if !quoted && letter.is_whitespace() => {
                    end = Some(at);
                    break;
                }
                letter => value.push(letter),
            }
        }
        if quoted && end.is_none() {
            return Err(ConnectionStringError::Quote);
        }
        pairs.push((key.to_owned(), value));
        rest = after[end.unwrap_or(after.len())..].trim_start();
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(String, u16, String, Option<PathBuf>), ConnectionStringError> {
        let server = ForeignServer::parse(text, None)?;
        Ok((server.host, server.port, server.role, server.authority))
    }

    #[test]
    fn a_connection_string_is_read_as_libpq_reads_it() {
        let is = |host: &str, port, role: &str, authority: Option<&str>| {
            Ok((host.to_owned(), port, role.to_owned(), authority.map(PathBuf::from)))
        };
        assert_eq!(parse("host=/run/postgresql"), is("/run/postgresql", 5432, "postgres", None));
        assert_eq!(parse("host=::1 port = 5433 user=anna"), is("::1", 5433, "anna", None));
        let quoted = "host='db1' user='it\\'s her' sslrootcert=/a\\ b";
        assert_eq!(parse(quoted), is("db1", 5432, "it's her", Some("/a b")));
        assert_eq!(parse("host=db1 sslmode=disable"), is("db1", 5432, "postgres", None));
    }

    #[test]
    fn nothing_leaves_the_host_in_clear_unless_it_is_said_and_no_password_stands_there() {
        for (text, told) in [
            ("host=db1", "how db1 is to be believed"),
            ("host=db1 sslmode=verify-full", "how db1 is to be believed"),
            ("host=db1 sslmode=require", "sslmode is \"require\""),
            ("host=db1 password=hunter2", "read by everybody"),
            ("host=db1 dbname=shop", "dbname is not known"),
            ("user=anna", "it has no host"),
            ("host=db1 port=0", "port is \"0\""),
            ("host='db1", "a quote has no end"),
            ("db1", "no key with a value"),
        ] {
            let error = ForeignServer::parse(text, None).err().unwrap();
            assert!(error.to_string().contains(told) && !error.hint().is_empty(), "{text}: {error}");
            assert!(!error.to_string().contains("hunter2"));
        }
    }
}
