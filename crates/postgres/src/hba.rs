//! Who may connect: `pg_hba.conf` in two states, and `pg_ident.conf`.
//!
//! With the gate closed only pgherd's own roles come in: the local superuser and monitor by the socket and `peer`,
//! replication, rewind and monitor over TLS with a certificate of the herd's CA and a SCRAM password, a proxy by
//! its certificate alone, which must name it as a proxy. With the gate open the herd file's lines follow. There is
//! no `trust` in either.
//!
//! Leaves out: sessions that are open already; a closed gate does not end them (a promotion
//! does). Hazard: a line of ours behind one
//! of the herd file's would never be reached, so ours come first, and refuse our roles on every other way in.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use crate::durable;
use crate::error::{Error, Result, blocking};
use crate::instance::Instance;
use crate::process::Server;
use crate::roles;
use crate::sql::Session;

const FILES: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);
const OPEN: &str = "# The gate is open.";
const CLOSED: &str = "# The gate is closed: nobody else.";
/// The map in `pg_ident.conf` from the operating system's user to our roles.
const MAP: &str = "pgherd";
/// The map from the common name of a proxy's certificate to its role. Anchored at both ends: a name that only
/// holds this one is another's. Quoted, because a comma would end the field.
const PROXY_MAP: &str = "pgherd_proxy";
const PROXY_NAME: &str = r#""/^pgherd:proxy/[a-z][a-z0-9_]{0,47}$""#;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Closed,
    Open,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HbaError {
    #[error("pg_hba line \"{line}\": {what}")]
    Line { line: String, what: &'static str },

    #[error("PostgreSQL does not accept line {number} of pg_hba.conf: {complaint}")]
    Rejected { number: i32, complaint: String },

    #[error("PostgreSQL has not taken over pg_hba.conf yet")]
    NotLoaded,

    #[error(transparent)]
    Other(#[from] Error),
}

/// Judges one line of the herd file.
pub fn check_line(line: &str) -> Result<(), HbaError> {
    let wrong = |what| Err(HbaError::Line { line: line.to_owned(), what });
    if line.contains(['\n', '\r', '\0']) {
        return wrong("it must be one line");
    }
    let fields = fields(line);
    let Some(kind) = fields.first() else { return wrong("it is empty") };
    let kind = kind.as_str();
    if !["local", "host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc"].contains(&kind) {
        return wrong("it must begin with local, host, hostssl or hostnossl");
    }
    // An address may be followed by a netmask of its own.
    let mut method_at = if kind == "local" { 3 } else { 4 };
    let is_mask = |field: &String| field.parse::<std::net::IpAddr>().is_ok();
    if kind != "local" && fields.get(4).is_some_and(is_mask) {
        method_at = 5;
    }
    let Some(method) = fields.get(method_at) else {
        return wrong("it lacks fields: type, database, user, address (not for local), method");
    };
    let databases: Vec<&str> = fields[1].split(',').collect();
    if databases.contains(&"replication") {
        return wrong("replication is pgherd's own");
    }
    match method.as_str() {
        "trust" => wrong("trust lets anybody in; use scram-sha-256"),
        "password" if kind != "hostssl" => wrong("password would send it in clear; use scram-sha-256"),
        "scram-sha-256" | "md5" | "password" | "cert" | "peer" | "reject" | "gss" | "sspi" | "ident"
        | "ldap" | "radius" | "pam" | "oauth" => Ok(()),
        _ => wrong("its method is unknown"),
    }
}

/// Splits as PostgreSQL does: blanks separate, quotes hold together, `#` begins a comment.
fn fields(line: &str) -> Vec<String> {
    let mut fields = Vec::new();
    let mut field: Option<String> = None;
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                field.get_or_insert_default();
            }
            '#' if !quoted => break,
            c if c.is_whitespace() && !quoted => fields.extend(field.take()),
            c => field.get_or_insert_default().push(c),
        }
    }
    fields.extend(field);
    fields
}

/// `pg_hba.conf`.
pub fn generate(gate: Gate, lines: &[String]) -> Result<String, HbaError> {
    let mut text = String::from(
        "# Written by pgherd, whole: add lines in the herd file (hba = [...]). TYPE DATABASE USER ADDRESS METHOD\n",
    );
    let certified = "scram-sha-256 clientcert=verify-ca";
    let (replication, rewind, monitor) = (roles::REPLICATION, roles::REWIND, roles::MONITOR);
    let proxy = roles::PROXY;
    let own = format!("{replication},{rewind},{monitor},{proxy}");
    for line in [
        format!("local all {} peer map={MAP}", roles::SUPERUSER),
        format!("local postgres {monitor} peer map={MAP}"),
        format!("hostssl replication {replication} all {certified}"),
        format!("hostssl postgres {rewind} all {certified}"),
        format!("hostssl postgres {monitor} all {certified}"),
        format!("hostssl postgres {proxy} all cert map={PROXY_MAP}"),
        format!("local all {own} reject"),
        "local replication all reject".to_owned(),
        format!("host all {own} all reject"),
        "host replication all all reject".to_owned(),
    ] {
        writeln!(text, "{line}").expect("a String takes any text");
    }
    match gate {
        Gate::Closed => writeln!(text, "{CLOSED}").expect("a String takes any text"),
        Gate::Open => {
            writeln!(text, "{OPEN}").expect("a String takes any text");
            for line in lines {
                check_line(line)?;
                writeln!(text, "{}", line.trim()).expect("a String takes any text");
            }
        }
    }
    Ok(text)
}

fn ident(instance: &Instance) -> String {
    let user = &instance.os_user;
    let mut text = String::from("# Written by pgherd. MAP SYSTEM-USER DATABASE-ROLE\n");
    for role in [roles::SUPERUSER, roles::MONITOR] {
        writeln!(text, "{MAP} \"{user}\" {role}").expect("a String takes any text");
    }
    writeln!(text, "{PROXY_MAP} {PROXY_NAME} {}", roles::PROXY).expect("a String takes any text");
    text
}

/// Writes both files, durably. `true` if one changed. In force after a reload, see [`verify`].
pub async fn write(instance: &Instance, gate: Gate, lines: &[String]) -> Result<bool, HbaError> {
    write_into(instance, gate, lines, &instance.data_dir).await
}

/// The same for a data directory that is still being made.
pub(crate) async fn write_into(
    instance: &Instance,
    gate: Gate,
    lines: &[String],
    data_dir: &Path,
) -> Result<bool, HbaError> {
    let hba = generate(gate, lines)?;
    let (data_dir, ident) = (data_dir.to_owned(), ident(instance));
    blocking("writing pg_hba.conf", FILES, move || {
        let write = |name: &str, text: &str| {
            durable::write_if_changed(&data_dir.join(name), text.as_bytes(), durable::PRIVATE)
        };
        let mapped = write("pg_ident.conf", &ident)?;
        Ok(write("pg_hba.conf", &hba)? || mapped)
    })
    .await
}

/// Replaces `pg_hba.conf`, which reaches the disk in its own time.
pub(crate) async fn put(instance: &Instance, gate: Gate, lines: &[String]) -> Result<(), HbaError> {
    let (hba, path) = (generate(gate, lines)?, instance.data_dir.join("pg_hba.conf"));
    let put = move || durable::put(&path, hba.as_bytes(), durable::PRIVATE);
    Ok(blocking("writing pg_hba.conf", FILES, put).await?)
}

/// Sets the gate of a running server: when this returns, no session can begin by other rules.
///
/// A file that is right already says nothing of what was loaded, so it is loaded again whatever it said.
pub async fn set(server: &Server, gate: Gate, lines: &[String], deadline: Duration) -> Result<(), HbaError> {
    let instance = server.instance();
    let asked = match gate {
        Gate::Open => {
            // Clients need not wait for the disk. Should the machine die first, the gate is found closed.
            put(instance, gate, lines).await?;
            let asked = std::time::SystemTime::now();
            server.reload()?;
            write(instance, gate, lines).await?;
            asked
        }
        Gate::Closed => {
            write(instance, gate, lines).await?;
            let asked = std::time::SystemTime::now();
            server.reload()?;
            asked
        }
    };
    let until = tokio::time::Instant::now() + deadline;
    loop {
        let session = Session::local(instance, roles::SUPERUSER, deadline).await?;
        match verify(&session, asked, deadline).await {
            Err(HbaError::NotLoaded) if tokio::time::Instant::now() < until => tokio::time::sleep(POLL).await,
            outcome => return outcome,
        }
    }
}

/// The state that the file on disk was written in, with whatever lines; `None` if it is not pgherd's.
pub async fn written(instance: &Instance) -> Result<Option<Gate>, HbaError> {
    let path = instance.data_dir.join("pg_hba.conf");
    let text: Result<_> = blocking("reading pg_hba.conf", FILES, move || durable::read_text(&path)).await;
    let text = text?.unwrap_or_default();
    let says = |line: &str| text.lines().any(|other| other == line);
    Ok(match (says(OPEN), says(CLOSED)) {
        (true, false) => Some(Gate::Open),
        (false, true) => Some(Gate::Closed),
        _ => None,
    })
}

/// Asks PostgreSQL whether it understands the file on disk.
///
/// That it has also taken it over shows only on a session opened afterwards: the postmaster reads the file before
/// it starts the next backend. So `client` must be a connection made after the reload was asked for, and the
/// moment of the last reload, which such a session inherits, must not lie before `asked`.
pub async fn verify(
    client: &Session,
    asked: std::time::SystemTime,
    deadline: Duration,
) -> Result<(), HbaError> {
    let work = async {
        let complaint = client
            .query_opt(
                "SELECT line_number, error FROM pg_catalog.pg_hba_file_rules \
                 WHERE error IS NOT NULL ORDER BY line_number LIMIT 1",
                &[],
            )
            .await
            .map_err(Error::sql("show its pg_hba.conf"))?;
        if let Some(row) = complaint {
            return Err(HbaError::Rejected { number: row.get(0), complaint: row.get(1) });
        }
        if has_loaded(client, asked).await? { Ok(()) } else { Err(HbaError::NotLoaded) }
    };
    crate::error::within("checking pg_hba.conf", deadline, work).await
}

/// Did the postmaster read its files after `asked`, and before it began this session?
pub(crate) async fn has_loaded(client: &Session, asked: std::time::SystemTime) -> Result<bool> {
    let row = client.query_one("SELECT pg_catalog.pg_conf_load_time()", &[]).await;
    let loaded: std::time::SystemTime = row.map_err(Error::sql("tell when it was reloaded"))?.get(0);
    Ok(loaded >= asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_may_not_be() {
        for wrong in [
            "",
            "# comment",
            "host all all 0.0.0.0/0 trust",
            "host all all 10.0.0.0 255.0.0.0 trust",
            "local all all trust",
            "host all all all password",
            "host replication rep 10.0.0.0/8 md5",
            "host all,replication rep 10.0.0.0/8 md5",
            "host all all 10.0.0.0/8",
            "host all all 10.0.0.0/8 scram-sha-255",
            "include /tmp/x",
            "host all all all md5\nlocal all all trust",
        ] {
            assert!(check_line(wrong).is_err(), "{wrong}");
        }
        for right in [
            "host all all 192.168.122.0/24 scram-sha-256",
            "hostssl app app 10.0.0.0 255.0.0.0 md5 # old clients",
            "local all all peer",
            "host \"replication\"x all samenet scram-sha-256",
        ] {
            assert!(check_line(right).is_ok(), "{right}");
        }
    }

    #[test]
    fn a_closed_gate_has_none_of_the_herds_lines_and_trust_is_in_neither() {
        let lines = vec!["host all all 10.0.0.0/8 scram-sha-256".to_owned()];
        let closed = generate(Gate::Closed, &lines).unwrap();
        let open = generate(Gate::Open, &lines).unwrap();
        assert!(!closed.contains(&lines[0]) && open.contains(&lines[0]));
        assert!(!closed.contains("trust") && !open.contains("trust"));
        let ours = open.find("hostssl replication").unwrap();
        assert!(ours < open.find(&lines[0]).unwrap());
    }
}
