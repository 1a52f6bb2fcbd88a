//! pgherd's own roles in PostgreSQL, and the application's.
//!
//! | role | may |
//! |---|---|
//! | `postgres` | everything; only from this machine's socket, as the agent's own user |
//! | `pgherd_replication` | stream WAL and clone |
//! | `pgherd_rewind` | the four functions that `pg_rewind` calls |
//! | `pgherd_monitor` | read statistics, end sessions, write a heartbeat message, begin a new segment of WAL |
//! | `pgherd_proxy` | read who may log in and by what verifier; only with a proxy's certificate |
//!
//! Passwords reach the server as SCRAM verifiers only, in a session that logs no statement and shows none in
//! `pg_stat_activity`. Every step can be repeated. Leaves out: keeping the secrets.
//!
//! Hazard: runs as superuser. Names are quoted and every function is named with its schema, so that nothing that a
//! user put into a search path is called.

use std::time::Duration;

use crate::error::{Error, Result, within};
use crate::secret::Verifier;
use crate::sql::{Session, literal, name};

pub const SUPERUSER: &str = "postgres";
pub const REPLICATION: &str = "pgherd_replication";
pub const REWIND: &str = "pgherd_rewind";
pub const MONITOR: &str = "pgherd_monitor";
pub const PROXY: &str = "pgherd_proxy";

/// Whose sessions are the herd's own, and go on while clients' are ended.
pub const OWN: [&str; 5] = [SUPERUSER, REPLICATION, REWIND, MONITOR, PROXY];

/// What a proxy has to know of a role before it lets a client in as that role.
const LOGIN_COLUMNS: &str = "rolname, rolcanlogin, rolvaliduntil, rolpassword";

/// A standby that is backed up waits for the last segment of its backup, which only the primary can begin anew.
const SWITCH_WAL: &str = "GRANT EXECUTE ON FUNCTION pg_catalog.pg_switch_wal() TO pgherd_monitor";

/// The verifiers of pgherd's own roles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnRoles {
    pub replication: Verifier,
    pub rewind: Verifier,
    pub monitor: Verifier,
}

/// A database of an application and the role that owns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppDatabase {
    pub database: String,
    pub owner: String,
    /// `None`: the role's password is left as it is.
    pub password: Option<Verifier>,
}

/// Statements of this session go into no log and no statistics: they carry verifiers.
const QUIET: &str = "SET log_statement = 'none'; SET log_min_duration_statement = -1; \
     SET log_min_error_statement = 'panic'; SET log_duration = off; SET log_min_duration_sample = -1; \
     SET track_activities = off; SET pg_stat_statements.track_utility = off; \
     SET search_path = pg_catalog, pg_temp";

/// Creates or corrects pgherd's own roles. `client` is a superuser on the primary.
///
/// At bootstrap no standby can acknowledge anything yet, hence `synchronous_commit = local`: what is created here
/// reaches the standbys with their clones.
pub async fn ensure_own(client: &Session, roles: &OwnRoles, deadline: Duration) -> Result<()> {
    let grants = format!(
        "GRANT EXECUTE ON FUNCTION pg_catalog.pg_ls_dir(text, boolean, boolean) TO {REWIND};\
         GRANT EXECUTE ON FUNCTION pg_catalog.pg_stat_file(text, boolean) TO {REWIND};\
         GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text) TO {REWIND};\
         GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) TO {REWIND};\
         GRANT pg_monitor, pg_signal_backend TO {MONITOR};\
         {SWITCH_WAL}"
    );
    within("creating pgherd's roles", deadline, async {
        quiet(client).await?;
        role(client, REPLICATION, "LOGIN REPLICATION", Some(&roles.replication)).await?;
        role(client, REWIND, "LOGIN", Some(&roles.rewind)).await?;
        role(client, MONITOR, "LOGIN", Some(&roles.monitor)).await?;
        run(client, "grant what pgherd's roles need", &grants).await?;
        proxy(client).await
    })
    .await
}

/// Creates or corrects the proxies' role alone, in a herd that was made before there was one. `client` is a
/// superuser on the primary, in the database `postgres`: there, and nowhere else, the role may read. `true` if it
/// had to be; a role that is right costs no write.
pub async fn ensure_proxy(client: &Session, deadline: Duration) -> Result<bool> {
    let right = format!(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_authid WHERE rolname = '{PROXY}' AND rolcanlogin \
           AND rolpassword IS NULL AND NOT (rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication \
           OR rolbypassrls) \
           AND (SELECT pg_catalog.bool_and(pg_catalog.has_column_privilege( \
             oid, 'pg_catalog.pg_authid'::pg_catalog.regclass, wanted, 'SELECT')) \
             FROM pg_catalog.string_to_table('{LOGIN_COLUMNS}', ', ') wanted))"
    );
    within("creating the proxies' role", deadline, async {
        let row = client.query_one(&right, &[]).await.map_err(Error::sql("show the proxies' role"))?;
        if row.get(0) {
            return Ok(false);
        }
        quiet(client).await?;
        proxy(client).await.map(|()| true)
    })
    .await
}

/// Lets the monitor's role begin a new segment of WAL, in a herd that was made before there were backups. `client` is a superuser on the
/// primary. `true` if it had to be granted.
pub async fn ensure_switch_wal(client: &Session, deadline: Duration) -> Result<bool> {
    let right = format!(
        "SELECT pg_catalog.has_function_privilege('{MONITOR}', 'pg_catalog.pg_switch_wal()', 'EXECUTE')"
    );
    within("granting what backups need", deadline, async {
        let row = client.query_one(&right, &[]).await.map_err(Error::sql("show the monitor's role"))?;
        if row.get(0) {
            return Ok(false);
        }
        quiet(client).await?;
        run(client, "grant what backups need", SWITCH_WAL).await.map(|()| true)
    })
    .await
}

/// No password can ever be right for it: its certificate is its proof.
async fn proxy(client: &Session) -> Result<()> {
    let attributes = "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD NULL";
    role(client, PROXY, attributes, None).await?;
    let grant = format!("GRANT SELECT ({LOGIN_COLUMNS}) ON pg_catalog.pg_authid TO {PROXY}");
    run(client, "grant what the proxies need", &grant).await
}

/// Creates or corrects an application's role and database.
pub async fn ensure_app(client: &Session, app: &AppDatabase, deadline: Duration) -> Result<()> {
    within("creating the application's database", deadline, async {
        quiet(client).await?;
        role(client, &app.owner, "LOGIN", app.password.as_ref()).await?;
        let query =
            "SELECT pg_catalog.pg_get_userbyid(datdba)::text FROM pg_catalog.pg_database WHERE datname = $1";
        let found =
            client.query_opt(query, &[&app.database]).await.map_err(Error::sql("list its databases"))?;
        let (database, owner) = (name(&app.database), name(&app.owner));
        match found.map(|row| row.get::<_, String>(0)) {
            None => {
                run(client, "create a database", &format!("CREATE DATABASE {database} OWNER {owner}")).await
            }
            Some(its) if its == app.owner => Ok(()),
            Some(_) => {
                run(
                    client,
                    "change a database's owner",
                    &format!("ALTER DATABASE {database} OWNER TO {owner}"),
                )
                .await
            }
        }
    })
    .await
}

async fn quiet(client: &Session) -> Result<()> {
    run(client, "quieten its log", QUIET).await?;
    run(client, "commit without standbys", "SET synchronous_commit = local").await
}

async fn run(client: &Session, doing: &'static str, statements: &str) -> Result<()> {
    client.batch_execute(statements).await.map_err(Error::sql(doing))
}

async fn role(client: &Session, role: &str, attributes: &str, password: Option<&Verifier>) -> Result<()> {
    let query = "SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = $1";
    let found = client.query_opt(query, &[&role]).await.map_err(Error::sql("list its roles"))?;
    let verb = if found.is_some() { "ALTER" } else { "CREATE" };
    let stored: Option<String> = found.and_then(|row| row.get(0));
    let secret = match password {
        Some(verifier) if stored.as_deref() != Some(verifier.as_str()) => {
            format!(" PASSWORD {}", literal(verifier.as_str()))
        }
        _ => String::new(),
    };
    run(client, "create a role", &format!("{verb} ROLE {} WITH {attributes}{secret}", name(role))).await
}
