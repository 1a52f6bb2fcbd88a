//! Every key of a herd file, once: what it takes, what it is without it, and whether it is built.

use super::super::reader::{Key, Section, key};
use super::super::repository;

/// Shown for a key that may be left out and then means nothing.
const NONE: &str = "none";

const fn not_built(name: &'static str, doc: &'static str) -> Key {
    Key { name, takes: "", example: "", default: NONE, doc, built: false }
}

pub(super) static TOP: Section = Section {
    header: "",
    keys: &[
        key("name", "a text", "\"shop\"", "", "the herd's name, which its certificates carry"),
        key("times", "a table", "[times]", NONE, "the times of the failover protocol"),
        key("postgres", "a table", "[postgres]", "", "which PostgreSQL runs, and how"),
        key(
            "witness",
            "tables",
            "[[witness]]",
            NONE,
            "agents without PostgreSQL that only vote in the store",
        ),
        key("cluster", "tables", "[[cluster]]", "", "one primary and its standbys"),
        key("proxy", "a table", "[proxy]", NONE, "where proxies listen, and what clients get there"),
        key(
            "backup",
            "a table",
            "[backup]",
            NONE,
            "where WAL and base backups go, and for how long they stay",
        ),
        not_built("store", "another store than the embedded one"),
    ],
};

pub(super) static TIMES: Section = Section {
    header: "[times]",
    keys: &[
        key("lease", "a time", "\"3s\"", "3s", "for how long after its proof a primary serves reads"),
        key(
            "renew",
            "a time",
            "\"500ms\"",
            "500ms",
            "how often a primary renews its term and commits a heartbeat",
        ),
        key(
            "suspect",
            "a time",
            "\"1500ms\"",
            "1500ms",
            "an agent's silence after which the voters' probes count",
        ),
        key(
            "agent_grace",
            "a time",
            "\"10s\"",
            "10s",
            "an agent's silence after which its PostgreSQL is given up",
        ),
        key("raft_heartbeat", "a time", "\"200ms\"", "200ms", "how often the Raft leader is heard"),
        key(
            "raft_election",
            "a time",
            "\"2s\"",
            "2s",
            "the longest silence of the Raft leader before an election",
        ),
    ],
};

pub(super) static POSTGRES: Section = Section {
    header: "[postgres]",
    keys: &[
        key(
            "version",
            "a major version",
            "15",
            NONE,
            "the distribution's PostgreSQL of this major, 14 to 18",
        ),
        key(
            "bin_dir",
            "a path",
            "\"/usr/lib/postgresql/15/bin\"",
            NONE,
            "in place of version: where its programs are",
        ),
        key("parameters", "a table", "{ max_connections = 100 }", NONE, "settings of postgresql.conf"),
        key(
            "hba",
            "texts",
            "[\"host all all 10.0.0.0/8 scram-sha-256\"]",
            NONE,
            "lines of pg_hba.conf, after pgherd's",
        ),
        key(
            "ident",
            "texts",
            "[\"people anna@example.com anna\"]",
            NONE,
            "lines of pg_ident.conf, for map= in hba: map, name in the certificate, role",
        ),
    ],
};

/// The same keys for all clusters and for one.
static PROXY_KEYS: [Key; 34] = [
    key("port", "a port", "6432", "9999", "where clients reach the primary"),
    key("read_port", "a port", "6433", "9998", "where clients reach standbys"),
    key(
        "pool",
        "\"transaction\", \"session\" or \"statement\"",
        "\"session\"",
        "transaction",
        "for how long a client has a server connection to itself",
    ),
    key("pool_size", "a number", "50", "20", "server connections of one database and user, at most"),
    key("databases", "a table", "{ reports = \"session\" }", NONE, "pool, for these databases"),
    key(
        "users",
        "a table",
        "{ migrate = \"session\" }",
        NONE,
        "pool, for these users, whatever database they use",
    ),
    key(
        "split_reads",
        "true or false",
        "true",
        "false",
        "with pool = \"transaction\": what provably only reads goes to standbys, also for those who may write",
    ),
    key(
        "read_your_writes",
        "true or false",
        "false",
        "true",
        "nobody reads from a standby that has not replayed what the same client wrote through this proxy",
    ),
    key(
        "read_wait",
        "a time",
        "\"200ms\"",
        "50ms",
        "so long a read waits for such a standby, before it goes to the primary",
    ),
    key(
        "max_replay_lag",
        "a time, or \"never\"",
        "\"5s\"",
        "30s",
        "a standby that is further behind takes no new reads; \"never\": however far it is",
    ),
    key(
        "unconfirmed_reads",
        "true or false",
        "true",
        "false",
        "standbys may show rows of which it is not known that they survive the next failover",
    ),
    key(
        "max_clients",
        "a number",
        "50000",
        "10000",
        "connections of clients in all, those that are coming in included",
    ),
    key("max_user_clients", "a number", "100", "0", "connections of one user; 0: no other limit"),
    key("max_database_clients", "a number", "500", "0", "connections to one database; 0: no other limit"),
    key(
        "query_wait",
        "a time",
        "\"10s\"",
        "2min",
        "so long a client waits for a server connection that is not in use",
    ),
    key("hold", "a time", "\"30s\"", "1min", "so long clients wait while there is no primary"),
    key(
        "commit_check",
        "true or false",
        "true",
        "false",
        "what became of a COMMIT that was lost with the primary is looked up; costs a round trip for each transaction that writes",
    ),
    key(
        "md5_passwords",
        "true or false",
        "true",
        "false",
        "whose password is stored for md5 comes in, where a line of hba has the method md5",
    ),
    key("login_timeout", "a time", "\"15s\"", "1min", "from a client's first byte to its proof of who it is"),
    key(
        "client_idle_timeout",
        "a time, or \"never\"",
        "\"1h\"",
        "never",
        "a client that asks for nothing for so long, outside of a transaction, is closed",
    ),
    key(
        "idle_transaction_timeout",
        "a time, or \"never\"",
        "\"5min\"",
        "never",
        "a client that asks for nothing for so long in a transaction is closed, and the transaction rolled back",
    ),
    key(
        "transaction_timeout",
        "a time, or \"never\"",
        "\"1h\"",
        "never",
        "a transaction that is open for so long is canceled, and its client closed",
    ),
    key(
        "query_timeout",
        "a time, or \"never\"",
        "\"30min\"",
        "never",
        "what is not answered after so long is canceled, and its client closed, also if the server is silent",
    ),
    key(
        "server_idle_timeout",
        "a time",
        "\"1min\"",
        "10min",
        "a server connection that nobody uses is closed after that",
    ),
    key(
        "server_lifetime",
        "a time",
        "\"10min\"",
        "1h",
        "a server connection is closed at that age, once nobody uses it",
    ),
    key(
        "console_admins",
        "texts",
        "[\"alice\"]",
        NONE,
        "roles that may do everything in the console, the database pgbouncer of every proxy",
    ),
    key("console_readers", "texts", "[\"monitor\"]", NONE, "roles that may look there"),
    key(
        "server_tls_mode",
        "one of libpq's six modes",
        "\"require\"",
        "verify-full",
        "how strictly servers are judged that clients are led to; \"disable\": in clear",
    ),
    key(
        "client_tls_mode",
        "one of libpq's six modes",
        "\"require\"",
        "prefer",
        "whether clients may or must have TLS, and from verify-ca on a certificate",
    ),
    key(
        "client_tls_cert_file",
        "a path",
        "\"/etc/pgherd/db.pem\"",
        "the herd's own certificate",
        "what clients are shown, with what it is signed by; on each proxy's host, read again when it changes",
    ),
    key("client_tls_key_file", "a path", "\"/etc/pgherd/db.key\"", NONE, "its key"),
    key(
        "client_tls_ca_file",
        "a path",
        "\"/etc/pgherd/clients.pem\"",
        NONE,
        "who signs certificates of clients; without it nobody is asked for one",
    ),
    key(
        "certificate_users",
        "texts",
        "[\"anna\"]",
        NONE,
        "roles that come in by hba lines of method cert, through proxies only",
    ),
    key(
        "metrics_listen",
        "an address with its port",
        "\"127.0.0.1:9127\"",
        NONE,
        "where each proxy serves its metrics over plain HTTP; \":9127\" for all addresses",
    ),
];

pub(super) static PROXY: Section = Section { header: "[proxy]", keys: &PROXY_KEYS };

pub(super) static CLUSTER_PROXY: Section = Section { header: "[cluster.proxy]", keys: &PROXY_KEYS };

pub(super) static WITNESS: Section = Section {
    header: "[[witness]]",
    keys: &[
        key("name", "a text", "\"w\"", "", "unique in the herd"),
        key("host", "a text", "\"192.0.2.40\"", "", "the address by which all others reach it"),
        key("api_port", "a port", "8009", "8009", "where its agent listens"),
    ],
};

pub(super) static CLUSTER: Section = Section {
    header: "[[cluster]]",
    keys: &[
        key("name", "a text", "\"main\"", "", "the cluster's name"),
        key(
            "durability",
            "\"quorum\" or \"async\"",
            "\"quorum\"",
            "quorum",
            "what an acknowledged commit has been through",
        ),
        key("needed", "a whole number", "1", "1", "standbys that must flush each commit"),
        key(
            "degrade_after",
            "a time or \"never\"",
            "\"30s\"",
            "never",
            "how long commits wait for standbys before they go on with fewer, declared",
        ),
        key("node", "tables", "[[cluster.node]]", "", "the servers"),
        key("database", "tables", "[[cluster.database]]", NONE, "databases that init creates"),
        not_built("postgres", "settings of one cluster alone"),
        key("proxy", "a table", "[cluster.proxy]", NONE, "over [proxy], for this cluster alone"),
        key("backup", "a table", "[cluster.backup]", NONE, "over [backup], for this cluster alone"),
        key("vip", "a table", "[cluster.vip]", NONE, "an address that is where clients are let in"),
        not_built("publication", "logical replication from this cluster"),
        not_built("subscription", "logical replication to this cluster"),
    ],
};

pub(super) static NODE: Section = Section {
    header: "[[cluster.node]]",
    keys: &[
        key("name", "a text", "\"a\"", "", "unique in the herd"),
        key("host", "a text", "\"192.0.2.10\"", "", "the address by which all others reach it"),
        key("port", "a port", "5432", "5432", "where its PostgreSQL listens"),
        key("api_port", "a port", "8009", "8009", "where its agent listens"),
        key(
            "read_weight",
            "a number",
            "0",
            "1",
            "as a standby, its share of the reads beside those of the others; 0: it serves none",
        ),
        key(
            "priority",
            "a whole number, 0 to 1000",
            "50",
            "100",
            "preferred between equals, greatest first; 0: never promoted",
        ),
        key(
            "parameters",
            "a table",
            "{ work_mem = \"8MB\" }",
            NONE,
            "over those of [postgres], on this node alone",
        ),
        key("follow", "the name of a node", "\"b\"", NONE, "stream from that node in place of the primary"),
        key("delay", "a time", "\"5min\"", NONE, "apply this late; never promoted, counts for no commit"),
    ],
};

pub(super) static DATABASE: Section = Section {
    header: "[[cluster.database]]",
    keys: &[
        key("name", "a text", "\"app\"", "", "the database"),
        key("owner", "a text", "\"app\"", "", "its owner, a role that can log in"),
    ],
};

/// The keys of a repository come from its own file.
static BACKUP_KEYS: [Key; 27] = {
    let [
        repository,
        keeper,
        region,
        endpoint,
        allow_http,
        access_key_file,
        secret_key_file,
        service_account_file,
        account,
        account_key_file,
        sas_token_file,
        passphrase_file,
        key_file,
    ] = repository::KEYS;
    [
        // Here it may be that of [backup].
        Key { default: NONE, ..repository },
        keeper,
        region,
        endpoint,
        allow_http,
        access_key_file,
        secret_key_file,
        service_account_file,
        account,
        account_key_file,
        sas_token_file,
        passphrase_file,
        key_file,
        key(
            "schedule",
            "five fields of cron in UTC, or \"never\"",
            "\"30 1 * * 7\"",
            "0 2 * * *",
            "when base backups are taken; the first one begins by itself",
        ),
        key(
            "retention",
            "\"REDUNDANCY n\" or \"RECOVERY WINDOW OF n DAYS\" (WEEKS, MONTHS)",
            "\"RECOVERY WINDOW OF 7 DAYS\"",
            NONE,
            "what is kept; the rest goes by itself, and without it nothing goes",
        ),
        key("minimum_redundancy", "a number", "2", "1", "so many base backups stay, whatever retention says"),
        key("daily", "a number", "7", "0", "for so many days, the last base backup of each stays, too"),
        key("weekly", "a number", "4", "0", "and of so many weeks"),
        key("monthly", "a number", "12", "0", "and of so many months"),
        key(
            "maximum_age",
            "a time, or \"never\"",
            "\"4d\"",
            "never",
            "pgherd check warns when the newest base backup is older",
        ),
        key(
            "archive_interval",
            "a time, or \"never\"",
            "\"5s\"",
            "1s",
            "how often WAL goes to the repository before its segment is full; never: whole segments alone",
        ),
        key(
            "throttle",
            "true or false",
            "false",
            "true",
            "whether a base backup is held back when it makes the server slow for its clients",
        ),
        key(
            "min_rate",
            "a number",
            "20",
            NONE,
            "in MiB a second, below which it is not; what takes a day, and 8 at least, if nothing is said",
        ),
        key(
            "voter",
            "true or false",
            "true",
            "false",
            "whether commits may wait until they are in the repository, which counts as one of `needed` then",
        ),
        key(
            "drill",
            "five fields of cron in UTC, or \"never\"",
            "\"0 4 * * 7\"",
            "never",
            "when a backup is restored on a standby's host, to see whether it can be",
        ),
        key(
            "drill_dir",
            "a path",
            "\"/srv/drill\"",
            NONE,
            "in which that is done; beside the agent's state if nothing is said. The whole cluster has to fit",
        ),
        key(
            "drill_queries",
            "a list of texts",
            "[\"app=SELECT count(*) > 0 FROM orders\"]",
            "[]",
            "asked there, each with its database: it fails if one returns false, null or no row",
        ),
    ]
};

pub(super) static BACKUP: Section = Section { header: "[backup]", keys: &BACKUP_KEYS };

pub(super) static CLUSTER_BACKUP: Section = Section { header: "[cluster.backup]", keys: &BACKUP_KEYS };

pub(super) static VIP: Section = Section {
    header: "[cluster.vip]",
    keys: &[
        key(
            "address",
            "an address with its prefix length",
            "\"192.0.2.9/24\"",
            "",
            "IPv4 or IPv6; a free one of the nodes' network",
        ),
        key("interface", "a text", "\"eth0\"", "", "what it is set on, on every node"),
    ],
};

/// In the order of the reference page.
pub(super) static ALL: [&Section; 12] = [
    &TOP,
    &TIMES,
    &POSTGRES,
    &PROXY,
    &BACKUP,
    &WITNESS,
    &CLUSTER,
    &NODE,
    &DATABASE,
    &CLUSTER_PROXY,
    &CLUSTER_BACKUP,
    &VIP,
];

/// The reference page of the herd file.
pub(super) fn reference() -> String {
    let mut page = String::from(
        "# The herd file\n\n\
         Made from the definitions that the program reads the file by; `PGHERD_UPDATE_GOLDEN=1 cargo test -p \
         pgherd-agent` writes it.\n\
         A time is a whole number with its unit: `500ms`, `3s`, `5min`, `1h`, `2d`. Unknown keys are errors.\n",
    );
    for section in ALL {
        let header = if section.header.is_empty() {
            "Top of the file".to_owned()
        } else {
            format!("`{}`", section.header)
        };
        page.push_str(&format!(
            "\n## {header}\n\n| key | takes | example | default | |\n|---|---|---|---|---|\n"
        ));
        for key in section.keys.iter().filter(|key| key.built) {
            let default = match key.default {
                "" => "required".to_owned(),
                NONE => "–".to_owned(),
                default => format!("`{default}`"),
            };
            page.push_str(&format!(
                "| `{}` | {} | `{}` | {default} | {} |\n",
                key.name, key.takes, key.example, key.doc
            ));
        }
        let missing: Vec<String> =
            section.keys.iter().filter(|key| !key.built).map(|key| format!("`{}`", key.name)).collect();
        if !missing.is_empty() {
            page.push_str(&format!("\nNot built yet, and refused: {}.\n", missing.join(", ")));
        }
    }
    page
}
