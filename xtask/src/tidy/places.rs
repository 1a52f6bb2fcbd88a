//! Names that belong to one crate: the files of a data directory, and the machine of whoever wrote a line.

use super::Complaint;
use super::source::Source;

/// Files and directories of PGDATA.
const PGDATA: &[&str] = &[
    "PG_VERSION",
    "backup_label",
    "global/pg_control",
    "pg_control",
    "pg_hba.conf",
    "pg_ident.conf",
    "pg_replslot",
    "pg_wal",
    "postgresql.auto.conf",
    "postgresql.conf",
    "postmaster.pid",
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
];

pub(super) fn check(source: &Source<'_>) -> Vec<Complaint> {
    let path = source.path();
    let shipped = path.starts_with("crates/") && !path.starts_with("crates/postgres/");
    if !shipped {
        return Vec::new();
    }
    let named = |text: &str| PGDATA.iter().any(|name| text == *name || text.ends_with(&format!("/{name}")));
    let found = source.texts.iter().filter(|(at, text)| !source.is_test(*at) && named(text));
    let complaint = |(at, text): &(usize, String)| {
        let why = "only crates/postgres touches a data directory, so that one place knows what is safe there";
        source.file.complaint(source.line(*at), format!("\"{text}\" names a file of a data directory"), why)
    };
    found.map(complaint).collect()
}

#[cfg(test)]
mod tests {
    use super::super::File;
    use super::*;

    #[test]
    fn files_of_a_data_directory_are_named_in_one_crate() {
        let found = |path: &str, text: &str| {
            let file = File { path: path.to_owned(), text: text.to_owned() };
            check(&Source::new(&file)).len()
        };
        let names = "dir.join(\"standby.signal\"); format!(\"{dir}/postmaster.pid\");";
        assert_eq!(found("crates/agent/src/a.rs", names), 2);
        assert_eq!(found("crates/postgres/src/a.rs", names), 0);
        assert_eq!(found("testkit/src/a.rs", names), 0);
        assert_eq!(found("crates/agent/src/a.rs", "\"lines of pg_hba.conf, after pgherd's\""), 0);
    }
}
