//! `pgherd psql`: psql with the right addresses, and without a password in its arguments or environment.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use clap::Args;
use pgherd_agent::files::herd::{self, Believed, Herd};
use pgherd_agent::local;
use pgherd_api::status::{Cluster, Member, ProxyTarget, Role, Status};

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::print_line;

/// A node that is gone must not hold up the next one for long.
const CONNECT_TIMEOUT_S: u32 = 3;

/// Run psql on the primary, wherever it is
///
/// Goes through the herd's proxy where there is one, and so survives a change of primary only as far as its
/// session does; without one libpq finds the primary itself. The password comes from a file that only this user can read; it is in no argument and no environment.
#[derive(Debug, Args)]
pub(crate) struct PsqlArgs {
    /// Connect to this node directly, whatever its role
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Print the connection string and run nothing
    #[arg(long, conflicts_with = "arguments")]
    print: bool,
    /// Database [default: the first one of the herd file]
    #[arg(short, long, value_name = "NAME")]
    database: Option<String>,
    /// Role [default: the owner of that database]
    #[arg(short = 'U', long, value_name = "NAME")]
    user: Option<String>,
    /// What else psql is given, after --
    #[arg(last = true, value_name = "ARGUMENT")]
    arguments: Vec<std::ffi::OsString>,
}

pub(crate) async fn run(args: PsqlArgs, global: &Global) -> Result<(), Failure> {
    let conninfo = found(&args, global).await?;
    if args.print {
        return print_line(&conninfo);
    }
    let psql = find_psql()?;
    // Takes the place of this process, and returns only if that failed.
    let error = std::process::Command::new(&psql).arg(conninfo).args(args.arguments).exec();
    Err(Failure::io("run", &psql, &error))
}

/// The connection string that was asked for.
async fn found(args: &PsqlArgs, global: &Global) -> Result<String, Failure> {
    let agents = Agents::find(global)?;
    let status = agents.call(async |client| client.status().await).await?;
    let cluster = super::cluster(&status, global.cluster.as_deref())?;
    let stored = agents.call(async |client| client.spec().await).await?;
    let read = herd::read("the herd's specification", &stored.text)?;
    let (database, user) = database_and_user(args, &read, cluster)?;
    let files = local::client_files(&global.dir()?);
    let proxy = Through::of(&status, cluster, &read).filter(|_| args.node.is_none());
    conninfo(cluster, proxy.as_ref(), args.node.as_deref(), &database, &user, &files)
}

/// The connection string of the primary, for the owner of a database.
pub(super) async fn of_primary(global: &Global, database: Option<&str>) -> Result<String, Failure> {
    let database = database.map(str::to_owned);
    let args = PsqlArgs { node: None, print: true, database, user: None, arguments: Vec::new() };
    found(&args, global).await
}

/// What was asked for, else what the herd file names first.
fn database_and_user(args: &PsqlArgs, herd: &Herd, cluster: &Cluster) -> Result<(String, String), Failure> {
    if let (Some(database), Some(user)) = (&args.database, &args.user) {
        return Ok((database.clone(), user.clone()));
    }
    let known = herd.spec.clusters.iter().filter(|known| known.name.as_str() == cluster.name);
    let databases = known.flat_map(|known| &known.databases);
    let mut databases =
        databases.map(|known| (known.name.as_str().to_owned(), known.owner.as_str().to_owned()));
    let found = match &args.database {
        Some(wanted) => databases.find(|(name, _)| name == wanted),
        None => databases.next(),
    };
    match (found, &args.database, &args.user) {
        (Some((database, owner)), _, user) => Ok((database, user.clone().unwrap_or(owner))),
        (None, Some(database), None) => {
            Err(Failure::usage(format!("the herd file names no owner of database \"{database}\""))
                .hint("name a role with --user"))
        }
        (None, _, _) => {
            Err(Failure::usage(format!("the herd file names no database of cluster {}", cluster.name))
                .hint("name one with --database and --user"))
        }
    }
}

/// A proxy that leads to the primary of a cluster.
#[derive(Debug)]
pub(super) struct Through {
    address: SocketAddr,
    believed: Believed,
}

impl Through {
    pub(super) fn of(status: &Status, cluster: &Cluster, herd: &Herd) -> Option<Through> {
        let mut proxies = status
            .proxy
            .iter()
            .filter(|proxy| proxy.cluster == cluster.name && proxy.target == ProxyTarget::ReadWrite);
        // One that listens everywhere does not say where that is.
        let is_somewhere = |at: &SocketAddr| !at.ip().is_unspecified();
        let address = proxies.find_map(|proxy| proxy.listen.parse().ok().filter(is_somewhere))?;
        Some(Through { address, believed: herd.believed(&cluster.name) })
    }
}

/// `proxy`: instead of the nodes.
pub(super) fn conninfo(
    cluster: &Cluster,
    proxy: Option<&Through>,
    node: Option<&str>,
    database: &str,
    user: &str,
    files: &local::ClientFiles,
) -> Result<String, Failure> {
    let mut members: Vec<&Member> = match node {
        Some(node) => {
            super::known_node(cluster, node)?;
            cluster.members.iter().filter(|member| member.name == node).collect()
        }
        None => {
            let mut all: Vec<&Member> = cluster.members.iter().collect();
            // The primary first saves a round trip to each standby before it.
            all.sort_by_key(|member| member.role != Role::Primary);
            all
        }
    };
    members.retain(|member| member.port.is_some());
    if members.is_empty() {
        return Err(Failure::usage("there is no PostgreSQL on that node"));
    }
    let joined = |part: &dyn Fn(&Member) -> String| {
        members.iter().map(|member| part(member)).collect::<Vec<_>>().join(",")
    };
    let (host, port) = match proxy {
        Some(Through { address, .. }) => (address.ip().to_string(), address.port().to_string()),
        None => (
            joined(&|member| member.host.clone()),
            joined(&|member| member.port.map_or(String::new(), |port| port.to_string())),
        ),
    };
    let mut pairs =
        vec![("host", host), ("port", port), ("dbname", database.to_owned()), ("user", user.to_owned())];
    if proxy.is_none() {
        pairs.push(("connect_timeout", CONNECT_TIMEOUT_S.to_string()));
    }
    if node.is_none() && proxy.is_none() {
        pairs.push(("target_session_attrs", "read-write".to_owned()));
    }
    if let Some(passfile) = &files.passfile {
        pairs.push(("passfile", passfile.display().to_string()));
    }
    match (proxy.map_or(Believed::ByHerd, |proxy| proxy.believed), &files.ca) {
        (Believed::ByHerd, Some(ca)) => {
            pairs.push(("sslmode", "verify-ca".to_owned()));
            pairs.push(("sslrootcert", ca.display().to_string()));
        }
        (Believed::ByHerd, None) => pairs.push(("sslmode", "require".to_owned())),
        (Believed::ByPassword, _) => {
            pairs.push(("sslmode", "require".to_owned()));
            pairs.push(("channel_binding", "require".to_owned()));
        }
        (Believed::InClear, _) => pairs.push(("sslmode", "disable".to_owned())),
    }
    Ok(pairs.iter().map(|(key, value)| format!("{key}={}", quoted(value))).collect::<Vec<_>>().join(" "))
}

/// As libpq wants values that are not plain words.
fn quoted(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./,:".contains(&byte);
    if !value.is_empty() && value.bytes().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// On the path, else beside a server of this machine.
fn find_psql() -> Result<PathBuf, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|dir| dir.join("psql"));
    let beside_servers = local::postgres_bin_dirs().into_iter().map(|dir| dir.join("psql"));
    on_path.chain(beside_servers).find(|candidate| is_file(candidate)).ok_or_else(|| {
        Failure::failed("psql is not installed")
            .because("it is not on the path, and beside no server of this machine")
            .hint("on Debian: apt-get install postgresql-client")
            .hint("pgherd psql --print prints the connection string for another client")
    })
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::status::tests::example;

    #[test]
    fn all_nodes_are_named_with_the_primary_first() {
        let cluster = example().clusters.remove(0);
        let files = local::ClientFiles { passfile: Some("/var/lib/pgherd/pgpass".into()), ca: None };
        assert_eq!(
            conninfo(&cluster, None, None, "app", "app", &files).unwrap(),
            "host=127.0.0.1,127.0.0.1,127.0.0.1 port=21000,21008,21004 dbname=app user=app connect_timeout=3 \
             target_session_attrs=read-write passfile=/var/lib/pgherd/pgpass sslmode=require"
        );
        let ca = local::ClientFiles { passfile: None, ca: Some("/my herd/ca.pem".into()) };
        assert_eq!(
            conninfo(&cluster, None, Some("b"), "it's", "app", &ca).unwrap(),
            r"host=127.0.0.1 port=21004 dbname='it\'s' user=app connect_timeout=3 sslmode=verify-ca sslrootcert='/my herd/ca.pem'"
        );
        let ways = [
            (Believed::ByHerd, &files, "passfile=/var/lib/pgherd/pgpass sslmode=require"),
            (Believed::ByHerd, &ca, "sslmode=verify-ca sslrootcert='/my herd/ca.pem'"),
            (Believed::ByPassword, &ca, "sslmode=require channel_binding=require"),
            (Believed::InClear, &ca, "sslmode=disable"),
        ];
        for (believed, files, end) in ways {
            let proxy = Through { address: "127.0.0.1:9999".parse().unwrap(), believed };
            assert_eq!(
                conninfo(&cluster, Some(&proxy), None, "app", "app", files).unwrap(),
                format!("host=127.0.0.1 port=9999 dbname=app user=app {end}")
            );
        }
        assert_eq!(conninfo(&cluster, None, Some("z"), "app", "app", &ca).unwrap_err().exit_code(), 2);
    }
}
