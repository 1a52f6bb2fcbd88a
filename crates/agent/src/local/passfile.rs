//! The passwords of the databases' owners, for clients on this host: `pgpass` in the state directory.
//!
//! libpq reads such a file where a conninfo names it, so that no password stands in an argument or in the
//! environment. The agent writes it when it has read the store's content, and again when an owner is added;
//! `up` copies one into its own directory. The herd's own roles are not in it.

use std::path::{Path, PathBuf};

use pgherd_core::spec::HerdSpec;

use crate::agreed::Secrets;
use crate::pki::{FileError, read_limited, write_private};

pub(super) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("pgpass")
}

/// Writes the file, mode 0600, unless it is as it should be.
pub(crate) fn keep(state_dir: &Path, spec: &HerdSpec, secrets: &Secrets) -> Result<(), FileError> {
    let path = path(state_dir);
    let text = text(spec, secrets);
    match read_limited(&path) {
        Ok(present) if present == text => Ok(()),
        _ => write_private(&path, &text),
    }
}

fn text(spec: &HerdSpec, secrets: &Secrets) -> String {
    let databases = spec.clusters.iter().flat_map(|cluster| &cluster.databases);
    let mut owners: Vec<&str> = databases.map(|database| database.owner.as_str()).collect();
    owners.sort_unstable();
    owners.dedup();
    let line = |owner: &&str| {
        let password = secrets.password(owner)?;
        // Any host, port and database: which node is primary changes, the password does not.
        Some(format!("*:*:*:{}:{}\n", escaped(owner), escaped(password)))
    };
    owners.iter().filter_map(line).collect()
}

/// A colon ends a field, and a backslash takes that away.
fn escaped(field: &str) -> String {
    field.replace('\\', "\\\\").replace(':', "\\:")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn owners_have_a_line_each_and_the_herds_own_roles_none() {
        let file = "name = \"shop\"\n[postgres]\nversion = 15\n[[cluster]]\nname = \"main\"\ndurability = \"async\"\n\
                    [[cluster.node]]\nname = \"a\"\nhost = \"192.0.2.1\"\n\
                    [[cluster.database]]\nname = \"one\"\nowner = \"app\"\n\
                    [[cluster.database]]\nname = \"two\"\nowner = \"app\"\n";
        let spec = crate::files::herd::read("herd.toml", file).unwrap().spec;
        let secret = |role: &str, password: &str| (format!("password/{role}"), password.to_owned());
        let secrets =
            BTreeMap::from([secret("app", "se:cr\\et"), secret("postgres", "x"), secret("other", "y")]);
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            keep(dir.path(), &spec, &Secrets(secrets.clone())).unwrap();
            assert_eq!(std::fs::read_to_string(path(dir.path())).unwrap(), "*:*:*:app:se\\:cr\\\\et\n");
        }
        let mode = std::fs::metadata(path(dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
