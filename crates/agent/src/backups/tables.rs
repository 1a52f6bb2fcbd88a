//! Tables of an earlier moment are brought into a server that works.
//!
//! ```text
//! look       the server that gets them: may they come, is their place free
//! bring      finds them in the scratch server, makes them there what they are to be, and brings them over in one transaction
//! ```
//!
//! A copy is made in the scratch server, where nothing is lost: the table moves into another schema or gets another name, with its
//! indexes and the sequences that it owns, and what binds it to others is taken off: foreign keys, triggers, rules, policies, extended statistics,
//! partitions' parents. Then `pg_dump` says what PostgreSQL says of such a table, and no statement is rewritten. In its own place it comes back as it was, with all of that.
//!
//! Leaves out: which moment. Hazard: writes into a server that works. Nothing that is there is touched: whatever has one of the names is a refusal, before
//! anything is brought, and what fails is undone as one transaction.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pgherd_api::backup::{BroughtTable, TableTarget};
use pgherd_core::spec::nearest;
pub use pgherd_postgres::scratch::Live;
use pgherd_postgres::scratch::{Dump, LiveError, ScratchError, transfer};
use pgherd_postgres::sql::{Session, literal, name as quoted};
use tokio::sync::watch;

use super::Progress;
use super::scratch::Running;

/// Where copies come, if nothing else is said.
pub const SCHEMA: &str = "restored";
/// Of `server_version_num`, what a major version has.
const MAJOR: u32 = 10_000;
/// Longer names are cut.
const MAX_NAME_BYTES: usize = 63;
/// Names that are told where a table is not found.
const MAX_NEAR: usize = 5;
/// How long a transaction whose client is gone may take to end before nobody waits for it any more.
const SETTLING: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);

/// A table as somebody names it, by PostgreSQL's rules: what is not in quotes is in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    pub schema: Option<String>,
    pub name: String,
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.schema {
            Some(schema) => f.write_str(&told(schema, &self.name)),
            None => f.write_str(&plain(&self.name)),
        }
    }
}

impl std::str::FromStr for TableName {
    type Err = String;

    fn from_str(text: &str) -> Result<TableName, String> {
        let mut parts = identifiers(text)?;
        let name = parts.pop().ok_or("it is empty")?;
        let schema = parts.pop();
        match parts.is_empty() {
            true => Ok(TableName { schema, name }),
            false => {
                Err("it is a table, or a schema, a dot and a table; --database names the database".to_owned())
            }
        }
    }
}

/// One identifier, as it is written in a statement.
pub fn identifier(text: &str) -> Result<String, String> {
    match <[String; 1]>::try_from(identifiers(text)?) {
        Ok([name]) => Ok(name),
        Err(_) => Err("it is one name; one with a dot has to be in quotes".to_owned()),
    }
}

fn identifiers(text: &str) -> Result<Vec<String>, String> {
    let mut parts = Vec::new();
    let mut rest = text.trim();
    loop {
        let (part, behind) = match rest.strip_prefix('"') {
            Some(inner) => in_quotes(inner).ok_or("a quote is not closed")?,
            None => {
                let end = rest.find(['.', '"']).unwrap_or(rest.len());
                (rest[..end].to_lowercase(), &rest[end..])
            }
        };
        if part.is_empty() || part.len() > MAX_NAME_BYTES || part.contains('\0') {
            return Err(format!("a name has one byte at least, and {MAX_NAME_BYTES} at most"));
        }
        parts.push(part);
        match behind.strip_prefix('.') {
            Some(next) => rest = next,
            None if behind.is_empty() => return Ok(parts),
            None => return Err("names are parted by a dot".to_owned()),
        }
    }
}

fn in_quotes(inner: &str) -> Option<(String, &str)> {
    let mut part = String::new();
    let mut rest = inner;
    loop {
        let end = rest.find('"')?;
        part.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(next) => {
                part.push('"');
                rest = next;
            }
            None => return Some((part, rest)),
        }
    }
}

/// As somebody would write it.
fn plain(name: &str) -> String {
    let is_plain = name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    if is_plain { name.to_owned() } else { quoted(name) }
}

fn told(schema: &str, name: &str) -> String {
    format!("{}.{}", plain(schema), plain(name))
}

/// What becomes of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placing {
    /// Beside what is there: in this schema, under this name; where one is not said it stays.
    Copy { schema: Option<String>, name: Option<String> },
    /// As they were.
    InPlace,
}

impl Placing {
    /// Where one of them goes, as far as that is known.
    pub fn of(&self, table: &TableName) -> TableName {
        match self {
            Placing::InPlace => table.clone(),
            Placing::Copy { schema, name } => TableName {
                schema: schema.clone().or_else(|| table.schema.clone()),
                name: name.clone().unwrap_or_else(|| table.name.clone()),
            },
        }
    }
}

/// What is wanted.
#[derive(Clone)]
pub struct Wanted {
    pub tables: Vec<TableName>,
    /// In which database they were; that of the connection if none is named.
    pub database: Option<String>,
    pub placing: Placing,
    /// They belong to who brings them in, and nobody is granted anything.
    pub no_owner: bool,
    pub live: Live,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TablesError {
    #[error("the server that gets the tables cannot be asked: {0}")]
    Ask(#[source] LiveError),
    #[error(transparent)]
    Live(#[from] LiveError),
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    #[error("PostgreSQL refused to {doing}: {why}")]
    Sql { doing: &'static str, why: String },
    #[error("the server that gets the tables is a standby")]
    Standby,
    #[error("the server that gets the tables is PostgreSQL {there}, older than that of the backup, {backup}")]
    Older { there: u32, backup: u32 },
    #[error("{table} is there already, in database {database}")]
    Present { table: String, database: String },
    #[error("there was no database {database}")]
    NoDatabase { database: String, near: Vec<String> },
    #[error("there was no table {table} in database {database}")]
    NoTable { table: String, database: String, near: Vec<String>, elsewhere: Vec<String> },
    #[error("there were several tables {table} in database {database}: {}", .there.join(", "))]
    Several { table: String, database: String, there: Vec<String> },
    #[error("{table} was {what}")]
    OtherKind { table: String, what: &'static str },
    #[error("{table} was unlogged, and the content of unlogged tables is in no backup")]
    Unlogged { table: String },
    #[error("{table} was a partitioned table, and its {partitions} partitions cannot all be given one name")]
    Partitioned { table: String, partitions: usize },
    #[error("the server that gets the tables has no role {}", .roles.join(", "))]
    NoRoles { roles: Vec<String> },
}

impl TablesError {
    pub fn hint(&self) -> Option<String> {
        match self {
            TablesError::Ask(LiveError::Refused { .. }) => {
                Some("--into is a connection string: \"host=… dbname=… user=…\", or postgresql://…".to_owned())
            }
            TablesError::Ask(error) | TablesError::Live(error) => error.hint(),
            TablesError::Scratch(error) => error.hint(),
            TablesError::Standby => Some("--into has to lead to the primary: target_session_attrs=read-write".to_owned()),
            TablesError::Older { .. } => Some("bring them into a server of the same version, or a later one".to_owned()),
            TablesError::Present { .. } => Some(
                "nothing that is there is written over: --into-schema or --as give it another place or name; or rename what is there".to_owned(),
            ),
            TablesError::NoDatabase { near, .. } => Some(format!("there were: {}", near.join(", "))),
            TablesError::NoTable { near, elsewhere, .. } => {
                let near = (!near.is_empty()).then(|| format!("there were: {}", near.join(", ")));
                let elsewhere = (!elsewhere.is_empty())
                    .then(|| format!("it was in another database: --database {}", elsewhere.join(" or ")));
                let moment = "at another moment there may have been: --target-time and its like say which";
                Some(elsewhere.or(near).unwrap_or_else(|| moment.to_owned()))
            }
            TablesError::Several { .. } => Some("name its schema: schema.table".to_owned()),
            TablesError::OtherKind { .. } => {
                Some("restore --to brings all of it back, into a directory of its own".to_owned())
            }
            TablesError::Partitioned { .. } => Some("--into-schema keeps their names".to_owned()),
            TablesError::NoRoles { .. } => {
                Some("create them, or leave owners and grants out with --no-owner".to_owned())
            }
            TablesError::Unlogged { .. } | TablesError::Sql { .. } => None,
        }
    }

    /// Whether somebody asked for what there is not, or must not be done.
    pub fn is_refusal(&self) -> bool {
        !matches!(
            self,
            TablesError::Ask(_) | TablesError::Live(_) | TablesError::Scratch(_) | TablesError::Sql { .. }
        )
    }
}

/// The server that gets them.
#[derive(Debug)]
pub struct Target {
    pub database: String,
    pub report: TableTarget,
    major: u32,
    begun: Mutex<Begun>,
}

/// What was begun there.
#[derive(Clone, Debug, Default)]
struct Begun {
    /// That were made for the tables.
    schemas: Vec<String>,
    /// That are about to come.
    tables: Vec<(String, String)>,
}

impl Target {
    fn begun(&self) -> std::sync::MutexGuard<'_, Begun> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the server that is to get them. Changes nothing.
pub async fn look(wanted: &Wanted) -> Result<Target, TablesError> {
    let question = "SELECT pg_catalog.current_database(), current_user, pg_catalog.current_setting('server_version_num'), \
                    pg_catalog.pg_is_in_recovery(), pg_catalog.inet_server_addr(), pg_catalog.inet_server_port()";
    let rows = wanted.live.ask(question).await.map_err(TablesError::Ask)?;
    let row = rows.into_iter().next().unwrap_or_default();
    let field = |at: usize| row.get(at).cloned().unwrap_or_default();
    if field(3) == "t" {
        return Err(TablesError::Standby);
    }
    let version: u32 = field(2).parse().unwrap_or(0);
    let report = TableTarget {
        database: field(0),
        role: field(1),
        address: (!field(4).is_empty()).then(|| field(4)),
        port: field(5).parse().ok(),
        postgresql_version: super::catalog::version(version),
    };
    let begun = Mutex::default();
    let target = Target { database: report.database.clone(), report, major: version / MAJOR, begun };
    for table in &wanted.tables {
        let place = wanted.placing.of(table);
        if let Some(schema) = place.schema {
            free(wanted, &target, &[(schema, place.name)]).await?;
        }
    }
    Ok(target)
}

/// Refuses names that something has.
async fn free(wanted: &Wanted, target: &Target, names: &[(String, String)]) -> Result<(), TablesError> {
    if names.is_empty() {
        return Ok(());
    }
    let listed: Vec<String> =
        names.iter().map(|(schema, name)| format!("({}, {})", literal(schema), literal(name))).collect();
    let question = format!(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE (n.nspname::text, c.relname::text) IN ({})",
        listed.join(", ")
    );
    match wanted.live.ask(&question).await?.first().map(Vec::as_slice) {
        Some([schema, name, ..]) => {
            Err(TablesError::Present { table: told(schema, name), database: target.database.clone() })
        }
        _ => Ok(()),
    }
}

/// A table of the scratch server.
#[derive(Clone, Debug)]
struct Found {
    oid: u32,
    schema: String,
    name: String,
    partitions: Vec<u32>,
}

/// Brings them, all or none.
pub async fn bring(
    running: &mut Running,
    wanted: &Wanted,
    target: &Target,
    progress: &watch::Sender<Progress>,
) -> Result<(Vec<BroughtTable>, u64, f64), TablesError> {
    let backup = u32::from(running.installation.version.major);
    if target.major < backup {
        return Err(TablesError::Older { there: target.major, backup });
    }
    let step = |step: &'static str| {
        progress.send_replace(Progress { step: Some(step), ..Progress::default() });
    };
    step("looking the tables up");
    let database = wanted.database.clone().unwrap_or_else(|| target.database.clone());
    let session = database_of(running, &database).await?;
    let mut found = Vec::new();
    for table in &wanted.tables {
        let one = find(running, &session, table, &database).await?;
        if !found.iter().any(|other: &Found| other.oid == one.oid) {
            found.push(one);
        }
    }
    let mut brought = Vec::new();
    let mut all = Vec::new();
    for table in &found {
        let (told, oids) = adapt(&session, table, wanted).await?;
        brought.push(told);
        all.extend(oids);
    }
    let names = relations(&session, &all).await?;
    free(wanted, target, &names).await?;
    roles_are_there(&session, wanted, &all).await?;
    let mut tables = Vec::new();
    for oid in &all {
        let row = session
            .query_one(
                "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1",
                &[oid],
            )
            .await
            .map_err(|error| failed("name a table", &error))?;
        tables.push((row.get(0), row.get(1)));
    }
    step("counting the rows");
    for (table, told) in found.iter().zip(&mut brought) {
        let counted = session
            .query_one(&format!("SELECT count(*) FROM {}", qualified(&session, table.oid).await?), &[])
            .await
            .map_err(|error| failed("count the rows", &error))?;
        told.rows = counted.get::<_, i64>(0).try_into().unwrap_or(0);
    }
    create_schemas(wanted, target, &tables).await?;
    target.begun().tables.clone_from(&tables);
    step("bringing over");
    let dump = Dump {
        conninfo: running.scratch.conninfo(&database),
        tables,
        owners: !wanted.no_owner,
        grants: !wanted.no_owner && wanted.placing == Placing::InPlace,
        tablespaces: wanted.placing == Placing::InPlace,
    };
    let began = Instant::now();
    let seen = |bytes| {
        progress.send_modify(|progress| progress.done_bytes = bytes);
    };
    let brought_over = transfer(&dump, &running.installation, &wanted.live, seen).await;
    let bytes = match brought_over {
        Ok(done) => done.bytes,
        Err(error) => {
            drop_schemas(wanted, target).await;
            return Err(error.into());
        }
    };
    Ok((brought, bytes, began.elapsed().as_secs_f64()))
}

/// What became of tables whose coming was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// Nothing came.
    Nothing,
    /// They were there already.
    TooLate,
    /// Their transaction has not ended yet: it waits for its standbys, perhaps.
    Unsettled,
}

/// Looks after a [`bring`] that was dropped, and takes back what was made for it.
pub async fn interrupted(wanted: &Wanted, target: &Target) -> Result<Interrupted, TablesError> {
    let begun = target.begun().clone();
    let until = Instant::now() + SETTLING;
    while !begun.tables.is_empty() && wanted.live.is_loading().await? {
        if Instant::now() >= until {
            return Ok(Interrupted::Unsettled);
        }
        tokio::time::sleep(POLL).await;
    }
    match free(wanted, target, &begun.tables).await {
        Err(TablesError::Present { .. }) => return Ok(Interrupted::TooLate),
        other => other?,
    }
    drop_schemas(wanted, target).await;
    Ok(Interrupted::Nothing)
}

/// Empty ones: if somebody else has put something there it stays.
async fn drop_schemas(wanted: &Wanted, target: &Target) {
    let schemas = std::mem::take(&mut target.begun().schemas);
    for schema in schemas {
        if let Err(error) = wanted.live.ask(&format!("DROP SCHEMA {}", quoted(&schema))).await {
            tracing::warn!(schema, %error, "a schema that was made for the tables stays");
        }
    }
}

fn failed(doing: &'static str, error: &dyn std::error::Error) -> TablesError {
    TablesError::Sql { doing, why: said(error) }
}

/// What happened, in PostgreSQL's words where it has said something: the driver's own are in front of them.
pub(super) fn said(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) if error.to_string() == "db error" => source.to_string(),
        _ => crate::causes::on_one_line(error),
    }
}

async fn database_of(running: &mut Running, database: &str) -> Result<Session, TablesError> {
    let all = databases(running).await?;
    if !all.iter().any(|known| known == database) {
        return Err(TablesError::NoDatabase { database: database.to_owned(), near: all });
    }
    Ok(running.scratch.connect(database, &running.how).await?)
}

/// That can be connected to.
pub(super) async fn databases(running: &mut Running) -> Result<Vec<String>, TablesError> {
    let session = running.scratch.connect("postgres", &running.how).await?;
    let rows = session
        .query(
            "SELECT datname::text FROM pg_database WHERE datallowconn AND datname <> 'template1' ORDER BY 1",
            &[],
        )
        .await
        .map_err(|error| failed("list the databases", &error))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn find(
    running: &mut Running,
    session: &Session,
    table: &TableName,
    database: &str,
) -> Result<Found, TablesError> {
    let rows = session
        .query(
            "SELECT c.oid, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relname = $1 AND ($2::text IS NULL OR n.nspname = $2) \
             AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)' ORDER BY 2",
            &[&table.name, &table.schema],
        )
        .await
        .map_err(|error| failed("look a table up", &error))?;
    let row = match rows.as_slice() {
        [row] => row,
        [] => return Err(missing(running, session, table, database).await?),
        several => {
            let there = several.iter().map(|row| told(row.get(1), row.get(2))).collect();
            return Err(TablesError::Several {
                table: table.to_string(),
                database: database.to_owned(),
                there,
            });
        }
    };
    let (oid, schema, name): (u32, String, String) = (row.get(0), row.get(1), row.get(2));
    let table = told(&schema, &name);
    let what = match row.get::<_, &str>(3) {
        "r" | "p" => None,
        "v" => Some("a view"),
        "m" => Some("a materialized view"),
        "S" => Some("a sequence"),
        "i" | "I" => Some("an index"),
        "f" => Some("a foreign table, whose rows are elsewhere"),
        _ => Some("no table"),
    };
    if let Some(what) = what {
        return Err(TablesError::OtherKind { table, what });
    }
    if row.get::<_, &str>(4) == "u" {
        return Err(TablesError::Unlogged { table });
    }
    let rows = session
        .query("SELECT relid::oid FROM pg_partition_tree($1::oid::regclass) WHERE relid <> $1::oid", &[&oid])
        .await
        .map_err(|error| failed("list the partitions", &error))?;
    Ok(Found { oid, schema, name, partitions: rows.iter().map(|row| row.get(0)).collect() })
}

/// What there was instead.
async fn missing(
    running: &mut Running,
    session: &Session,
    table: &TableName,
    database: &str,
) -> Result<TablesError, TablesError> {
    let rows = session
        .query(
            "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)' \
             ORDER BY 1, 2",
            &[],
        )
        .await
        .map_err(|error| failed("list the tables", &error))?;
    let all: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let mut near: Vec<String> = all
        .iter()
        .filter(|(_, name)| name.eq_ignore_ascii_case(&table.name))
        .map(|(schema, name)| told(schema, name))
        .collect();
    if let Some(meant) = nearest(&table.name, all.iter().map(|(_, name)| name.as_str())) {
        near.extend(all.iter().filter(|(_, name)| name == meant).map(|(schema, name)| told(schema, name)));
    }
    near.dedup();
    near.truncate(MAX_NEAR);
    let mut elsewhere = Vec::new();
    for other in databases(running).await?.into_iter().filter(|other| other != database) {
        let session = running.scratch.connect(&other, &running.how).await?;
        let there = session
            .query(
                "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE c.relkind IN ('r', 'p') AND c.relname = $1 AND ($2::text IS NULL OR n.nspname = $2)",
                &[&table.name, &table.schema],
            )
            .await
            .map_err(|error| failed("look a table up", &error))?;
        if !there.is_empty() {
            elsewhere.push(plain(&other));
        }
    }
    elsewhere.truncate(MAX_NEAR);
    Ok(TablesError::NoTable { table: table.to_string(), database: database.to_owned(), near, elsewhere })
}

/// Makes of a table in the scratch server what it is to be, and says what that is. All of its parts are returned.
async fn adapt(
    session: &Session,
    table: &Found,
    wanted: &Wanted,
) -> Result<(BroughtTable, Vec<u32>), TablesError> {
    let was = told(&table.schema, &table.name);
    let oids: Vec<u32> = std::iter::once(table.oid).chain(table.partitions.iter().copied()).collect();
    let mut left_out = Vec::new();
    if let Placing::Copy { schema, name } = &wanted.placing {
        if name.is_some() && !table.partitions.is_empty() {
            return Err(TablesError::Partitioned { table: was, partitions: table.partitions.len() });
        }
        // A table whose parent does not come along is none's partition.
        loosen(session, table.oid, &mut left_out).await?;
        for oid in &oids {
            strip(session, *oid, &mut left_out).await?;
        }
        if let Some(schema) = schema {
            run(session, &format!("CREATE SCHEMA IF NOT EXISTS {}", quoted(schema))).await?;
            let names = relations(session, &oids).await?.into_iter().map(|(_, name)| name).collect();
            make_room(session, schema, names).await?;
            for oid in &oids {
                let place = qualified(session, *oid).await?;
                run(session, &format!("ALTER TABLE {place} SET SCHEMA {}", quoted(schema))).await?;
            }
        }
        if let Some(name) = name {
            rename(session, table, schema.as_ref().unwrap_or(&table.schema), name).await?;
        }
    }
    let lines = async |question: &str| -> Result<Vec<String>, TablesError> {
        let rows =
            session.query(question, &[&oids]).await.map_err(|error| failed("describe a table", &error))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    };
    let names = lines(
        "SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ($1::oid[])[1] \
         UNION ALL SELECT relname::text FROM pg_class WHERE oid = ($1::oid[])[1] \
         UNION ALL SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = ($1::oid[])[1]",
    )
    .await?;
    let name = |at: usize| names.get(at).cloned().unwrap_or_default();
    let brought = BroughtTable {
        table: was,
        brought_as: told(&name(0), &name(1)),
        rows: 0,
        partitions: table.partitions.len() as u64,
        owner: (!wanted.no_owner).then(|| name(2)),
        indexes: lines(
            "SELECT c.relname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = ANY ($1) ORDER BY 1",
        )
        .await?,
        constraints: lines(
            "SELECT conname::text FROM pg_constraint WHERE conrelid = ANY ($1) AND contype <> 't' ORDER BY 1",
        )
        .await?,
        sequences: lines(
            "SELECT c.relname::text FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S' \
             WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1) \
             AND d.deptype IN ('a', 'i') ORDER BY 1",
        )
        .await?,
        left_out,
    };
    Ok((brought, oids))
}

async fn run(session: &Session, statement: &str) -> Result<(), TablesError> {
    session.batch_execute(statement).await.map_err(|error| failed("prepare a table", &error))
}

async fn qualified(session: &Session, oid: u32) -> Result<String, TablesError> {
    let row = session
        .query_one("SELECT $1::oid::regclass::text", &[&oid])
        .await
        .map_err(|error| failed("name a table", &error))?;
    Ok(row.get(0))
}

/// Takes a partition from its parent, and a table from those that it inherits from.
async fn loosen(session: &Session, oid: u32, left_out: &mut Vec<String>) -> Result<(), TablesError> {
    let rows = session
        .query(
            "SELECT inhparent::regclass::text, c.relispartition FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhrelid = $1",
            &[&oid],
        )
        .await
        .map_err(|error| failed("look for the parents of a table", &error))?;
    let table = qualified(session, oid).await?;
    for row in rows {
        let (parent, is_partition): (String, bool) = (row.get(0), row.get(1));
        match is_partition {
            true => run(session, &format!("ALTER TABLE {parent} DETACH PARTITION {table}")).await?,
            false => run(session, &format!("ALTER TABLE {table} NO INHERIT {parent}")).await?,
        }
        left_out.push(format!("that it belongs to {parent}"));
    }
    Ok(())
}

/// Takes off what binds a table to others, or would act in the server that gets it.
async fn strip(session: &Session, oid: u32, left_out: &mut Vec<String>) -> Result<(), TablesError> {
    let table = qualified(session, oid).await?;
    let rows = session
        .query(
            "SELECT 'foreign key', conname::text, format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) \
               FROM pg_constraint WHERE conrelid = $1 AND contype = 'f' AND conparentid = 0 \
             UNION ALL SELECT 'trigger', tgname::text, format('DROP TRIGGER %I ON %s', tgname, tgrelid::regclass) \
               FROM pg_trigger WHERE tgrelid = $1 AND NOT tgisinternal AND tgparentid = 0 \
             UNION ALL SELECT 'rule', rulename::text, format('DROP RULE %I ON %s', rulename, ev_class::regclass) \
               FROM pg_rewrite WHERE ev_class = $1 \
             UNION ALL SELECT 'policy', polname::text, format('DROP POLICY %I ON %s', polname, polrelid::regclass) \
               FROM pg_policy WHERE polrelid = $1 \
             UNION ALL SELECT 'statistics', stxname::text, format('DROP STATISTICS %I.%I', n.nspname, stxname) \
               FROM pg_statistic_ext JOIN pg_namespace n ON n.oid = stxnamespace WHERE stxrelid = $1 ORDER BY 1, 2",
            &[&oid],
        )
        .await
        .map_err(|error| failed("look for what a table is bound to", &error))?;
    for row in rows {
        let (kind, name, statement): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        run(session, &statement).await?;
        left_out.push(format!("{kind} {}", plain(&name)));
    }
    run(session, &format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY"))
        .await
}

/// Takes names from whatever has them in the scratch server: only in the one that gets the tables they have to be free.
async fn make_room(session: &Session, schema: &str, names: Vec<String>) -> Result<(), TablesError> {
    let rows = session
        .query(
            "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relname::text = ANY ($2) AND c.relkind <> 'c'",
            &[&schema, &names],
        )
        .await
        .map_err(|error| failed("look for names that are taken", &error))?;
    for row in rows {
        let oid: u32 = row.get(0);
        let place = qualified(session, oid).await?;
        run(session, &format!("ALTER TABLE {place} RENAME TO pgherd_away_{oid}")).await?;
    }
    Ok(())
}

/// Gives a table another name, and its indexes and sequences names that go with it: in its schema there may be those that it had.
async fn rename(session: &Session, table: &Found, schema: &str, name: &str) -> Result<(), TablesError> {
    make_room(session, schema, vec![name.to_owned()]).await?;
    let rows = session
        .query(
            "SELECT c.oid, c.relname::text, c.relkind::text FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid WHERE i.indrelid = $1 \
             UNION SELECT c.oid, c.relname::text, c.relkind::text FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S' \
             WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 AND d.deptype IN ('a', 'i') \
             ORDER BY 2",
            &[&table.oid],
        )
        .await
        .map_err(|error| failed("list indexes and sequences", &error))?;
    let mut taken = Vec::new();
    for row in rows {
        let (oid, was, kind): (u32, String, String) = (row.get(0), row.get(1), row.get(2));
        let becomes = renamed(&was, &table.name, name, &taken);
        let what = if kind == "S" { "SEQUENCE" } else { "INDEX" };
        make_room(session, schema, vec![becomes.clone()]).await?;
        let place = qualified(session, oid).await?;
        run(session, &format!("ALTER {what} {place} RENAME TO {}", quoted(&becomes))).await?;
        taken.push(becomes);
    }
    let place = qualified(session, table.oid).await?;
    run(session, &format!("ALTER TABLE {place} RENAME TO {}", quoted(name))).await
}

/// `orders_pkey` of `orders` that becomes `old` is `old_pkey`.
fn renamed(was: &str, table: &str, becomes: &str, taken: &[String]) -> String {
    let rest = was.strip_prefix(table).filter(|rest| rest.starts_with('_')).map(str::to_owned);
    let rest = rest.unwrap_or_else(|| format!("_{was}"));
    let numbered = |number: usize| {
        let number = if number == 0 { String::new() } else { number.to_string() };
        let left = MAX_NAME_BYTES - number.len();
        // Of a long tail the table's name is not pushed out as a whole.
        let tail = cut(&rest, left - left / 4);
        format!("{}{tail}{number}", cut(becomes, left - tail.len()))
    };
    (0..).map(numbered).find(|name| !taken.contains(name)).expect("there are more numbers than names")
}

fn cut(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Everything that gets a name in a schema: tables, their indexes, the sequences that they own.
async fn relations(session: &Session, oids: &[u32]) -> Result<Vec<(String, String)>, TablesError> {
    let oids = oids.to_vec();
    let rows = session
        .query(
            "WITH one AS (SELECT unnest($1::oid[]) AS oid UNION SELECT indexrelid FROM pg_index WHERE indrelid = ANY ($1) \
               UNION SELECT objid FROM pg_depend WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass \
                 AND refobjid = ANY ($1) AND deptype IN ('a', 'i')) \
             SELECT n.nspname::text, c.relname::text FROM one JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind IN ('r', 'p', 'i', 'I', 'S') ORDER BY c.relkind DESC, 1, 2",
            &[&oids],
        )
        .await
        .map_err(|error| failed("list what comes along", &error))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Refuses owners and grantees that the server does not have.
async fn roles_are_there(session: &Session, wanted: &Wanted, oids: &[u32]) -> Result<(), TablesError> {
    if wanted.no_owner {
        return Ok(());
    }
    let grants = wanted.placing == Placing::InPlace;
    let oids = oids.to_vec();
    let rows = session
        .query(
            "SELECT DISTINCT pg_get_userbyid(o)::text FROM ( \
               SELECT relowner AS o FROM pg_class WHERE oid = ANY ($1) \
               UNION SELECT (aclexplode(relacl)).grantee FROM pg_class WHERE oid = ANY ($1) AND $2) roles WHERE o <> 0 ORDER BY 1",
            &[&oids, &grants],
        )
        .await
        .map_err(|error| failed("list owners and grants", &error))?;
    let needed: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let there = wanted.live.ask("SELECT rolname FROM pg_catalog.pg_roles").await?;
    let roles: Vec<String> =
        needed.into_iter().filter(|role| !there.iter().any(|row| row.first() == Some(role))).collect();
    if roles.is_empty() { Ok(()) } else { Err(TablesError::NoRoles { roles }) }
}

/// Makes the schemas that are missing.
async fn create_schemas(
    wanted: &Wanted,
    target: &Target,
    tables: &[(String, String)],
) -> Result<(), TablesError> {
    let mut schemas: Vec<&String> = tables.iter().map(|(schema, _)| schema).collect();
    schemas.sort();
    schemas.dedup();
    for schema in schemas {
        let question = format!("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = {}", literal(schema));
        if wanted.live.ask(&question).await?.is_empty() {
            wanted.live.ask(&format!("CREATE SCHEMA {}", quoted(schema))).await?;
            target.begun().schemas.push(schema.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<(Option<String>, String), String> {
        text.parse::<TableName>().map(|table| (table.schema, table.name))
    }

    #[test]
    fn a_table_is_named_as_in_a_statement() {
        let some = |schema: &str, name: &str| Ok((Some(schema.to_owned()), name.to_owned()));
        assert_eq!(parsed("Orders"), Ok((None, "orders".to_owned())));
        assert_eq!(parsed("Shop.Orders"), some("shop", "orders"));
        assert_eq!(parsed(r#""Shop"."Or.""ders""#), some("Shop", "Or.\"ders"));
        for wrong in ["", "a.", ".a", "a.b.c", "\"a", "\"a\"b", "\"\"", &"x".repeat(64)] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
        assert_eq!(identifier("Old"), Ok("old".to_owned()));
        assert!(identifier("a.b").is_err());
        let strange: TableName = "shop.\"Orders\"".parse().unwrap();
        assert_eq!(strange.to_string(), "shop.\"Orders\"");
    }

    #[test]
    fn what_goes_with_a_table_gets_a_name_that_goes_with_its_new_one() {
        assert_eq!(renamed("orders_pkey", "orders", "old", &[]), "old_pkey");
        assert_eq!(renamed("by_customer", "orders", "old", &[]), "old_by_customer");
        assert_eq!(renamed("orders_pkey", "orders", "old", &["old_pkey".to_owned()]), "old_pkey1");
        let long = "ö".repeat(31);
        let name = renamed("orders_pkey", "orders", &long, &[]);
        assert!(name.len() <= MAX_NAME_BYTES && name.ends_with("_pkey"), "{name}");
        let both = renamed(&"i".repeat(63), "orders", &long, &[]);
        assert!(
            both.len() <= MAX_NAME_BYTES
                && both != renamed(&"i".repeat(63), "orders", &long, std::slice::from_ref(&both))
        );
    }
}
