//! Who may connect: `pg_hba.conf` in two states, and `pg_ident.conf`.
//!
//! With the gate closed only pgherd's own roles come in: the local superuser and monitor by the socket and `peer`,
//! replication, rewind and monitor over TLS with a certificate of the herd's CA and a SCRAM password, a proxy by
//! its certificate alone, which must name it as a proxy. With the gate open roles follow that come in through proxies
//! only, by the same certificate, and then the herd file's lines. There is no `trust` in either.
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

/// The map from that name to the roles whose clients have shown a certificate to the proxy.
const PROXIED_MAP: &str = "pgherd_proxied";

/// Who comes in while the gate is open, beside pgherd itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Of the herd file, as they stand there.
    pub lines: Vec<String>,
    /// The same for `pg_ident.conf`.
    pub maps: Vec<String>,
    /// Roles that come in by a proxy's certificate, and in no other way: the first line that fits decides.
    pub through_proxies: Vec<String>,
}

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

    #[error("pg_ident line \"{line}\": {what}")]
    Map { line: String, what: &'static str },

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
    if line.contains(['\n', '\r', '\0']) || line.trim_end().ends_with('\\') {
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

/// Judges one line of the herd file that goes into `pg_ident.conf`. One that PostgreSQL does not read costs the whole file.
pub fn check_map(line: &str) -> Result<(), HbaError> {
    let wrong = |what| Err(HbaError::Map { line: line.to_owned(), what });
    if line.contains(['\n', '\r', '\0']) || line.trim_end().ends_with('\\') {
        return wrong("it must be one line");
    }
    match fields(line).as_slice() {
        [map, ..] if map.starts_with("pgherd") => wrong("its map is pgherd's own"),
        [map, ..] if map.starts_with("include") || map.starts_with('@') => {
            wrong("it would read another file")
        }
        [_, _, role] if role.starts_with("pgherd") => wrong("its role is pgherd's own"),
        [_, _, _] => Ok(()),
        _ => wrong("it must be a map, a name, and a role"),
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
pub fn generate(gate: Gate, rules: &Rules) -> Result<String, HbaError> {
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
            if !rules.through_proxies.is_empty() {
                let users = list(&rules.through_proxies)?;
                for line in [
                    format!("hostssl all {users} all cert map={PROXIED_MAP}"),
                    format!("local all {users} reject"),
                ] {
                    writeln!(text, "{line}").expect("a String takes any text");
                }
            }
            for line in &rules.lines {
                check_line(line)?;
                writeln!(text, "{}", line.trim()).expect("a String takes any text");
            }
        }
    }
    Ok(text)
}

/// Roles, so that each is itself and nothing else.
fn list(roles: &[String]) -> Result<String, HbaError> {
    let quoted: Result<Vec<String>, HbaError> = roles.iter().map(|role| quote(role)).collect();
    Ok(quoted?.join(","))
}

fn quote(role: &str) -> Result<String, HbaError> {
    let is_plain = !role.is_empty()
        && !role.starts_with(['/', '+', '@'])
        && !role.contains(|letter: char| letter == '"' || letter.is_control());
    if is_plain && !role.starts_with("pgherd") {
        return Ok(format!("\"{role}\""));
    }
    Err(HbaError::Line { line: role.to_owned(), what: "it is no role that comes in through proxies alone" })
}

fn ident(instance: &Instance, rules: &Rules) -> Result<String, HbaError> {
    let user = &instance.os_user;
    let mut text = String::from("# Written by pgherd. MAP SYSTEM-USER DATABASE-ROLE\n");
    for role in [roles::SUPERUSER, roles::MONITOR] {
        writeln!(text, "{MAP} \"{user}\" {role}").expect("a String takes any text");
    }
    writeln!(text, "{PROXY_MAP} {PROXY_NAME} {}", roles::PROXY).expect("a String takes any text");
    for role in &rules.through_proxies {
        writeln!(text, "{PROXIED_MAP} {PROXY_NAME} {}", quote(role)?).expect("a String takes any text");
    }
    for line in &rules.maps {
        check_map(line)?;
        writeln!(text, "{}", line.trim()).expect("a String takes any text");
    }
    Ok(text)
}

/// Writes both files, durably. `true` if one changed. In force after a reload, see [`verify`].
pub async fn write(instance: &Instance, gate: Gate, rules: &Rules) -> Result<bool, HbaError> {
    write_into(instance, gate, rules, &instance.data_dir).await
}

/// The same for a data directory that is still being made.
pub(crate) async fn write_into(
    instance: &Instance,
    gate: Gate,
    rules: &Rules,
    data_dir: &Path,
) -> Result<bool, HbaError> {
    let hba = generate(gate, rules)?;
    let (data_dir, ident) = (data_dir.to_owned(), ident(instance, rules)?);
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
pub(crate) async fn put(instance: &Instance, gate: Gate, rules: &Rules) -> Result<(), HbaError> {
    let (hba, path) = (generate(gate, rules)?, instance.data_dir.join("pg_hba.conf"));
    let put = move || durable::put(&path, hba.as_bytes(), durable::PRIVATE);
    Ok(blocking("writing pg_hba.conf", FILES, put).await?)
}

/// Sets the gate of a running server: when this returns, no session can begin by other rules.
///
/// A file that is right already says nothing of what was loaded, so it is loaded again whatever it said.
pub async fn set(server: &Server, gate: Gate, rules: &Rules, deadline: Duration) -> Result<(), HbaError> {
    let instance = server.instance();
    let asked = match gate {
        Gate::Open => {
            // Clients need not wait for the disk. Should the machine die first, the gate is found closed.
            put(instance, gate, rules).await?;
            let asked = std::time::SystemTime::now();
            server.reload()?;
            write(instance, gate, rules).await?;
            asked
        }
        Gate::Closed => {
            write(instance, gate, rules).await?;
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
        let line = "host all all 10.0.0.0/8 scram-sha-256";
        let through_proxies = vec!["anna".to_owned(), "all".to_owned()];
        let rules = Rules { lines: vec![line.to_owned()], through_proxies, ..Rules::default() };
        let closed = generate(Gate::Closed, &rules).unwrap();
        let open = generate(Gate::Open, &rules).unwrap();
        assert!(!closed.contains(line) && open.contains(line));
        assert!(!closed.contains("trust") && !open.contains("trust"));
        let proxied = "hostssl all \"anna\",\"all\" all cert map=pgherd_proxied";
        assert!(!closed.contains(proxied));
        let at = |line: &str| open.find(line).unwrap();
        assert!(at("hostssl replication") < at(proxied) && at(proxied) < at(line));
        assert!(at("local all \"anna\",\"all\" reject") < at(line), "and by no socket");
    }

    #[test]
    fn maps_that_may_not_be() {
        for wrong in [
            "",
            "people anna",
            "people anna anna anna",
            "people anna anna\npgherd_proxy anna pgherd_proxy",
            "people anna anna \\",
            "pgherd_proxy anna anna",
            "\"pgherd_proxied\" anna anna",
            "people anna pgherd_agent",
            "include /tmp/x y",
        ] {
            assert!(check_map(wrong).is_err(), "{wrong}");
        }
        for right in ["people \"CN=Anna B,O=x\" anna # hers", "people /^(.*)@example\\.com$ \\1"] {
            assert!(check_map(right).is_ok(), "{right}");
        }
    }

    #[test]
    fn a_role_that_could_be_read_as_something_else_is_not_written() {
        for wrong in ["", "+admins", "/^a", "@file", "a\",\"b", "a\nlocal all all trust", "pgherd_agent"] {
            let rules = Rules { through_proxies: vec![wrong.to_owned()], ..Rules::default() };
            assert!(generate(Gate::Open, &rules).is_err(), "{wrong}");
        }
    }
}
