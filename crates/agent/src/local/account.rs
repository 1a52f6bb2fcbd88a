//! As whom agents and PostgreSQL run: as user postgres when root starts them, else as the calling user.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::LocalError;

const USER: &str = "postgres";
const PASSWD: &str = "/etc/passwd";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) home: PathBuf,
}

impl Account {
    /// The user to change to; `None` when this process is not root and may not.
    pub(super) fn to_change_to() -> Result<Option<Account>, LocalError> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let passwd = fs::read_to_string(PASSWD).map_err(LocalError::io("read", PASSWD))?;
        parse(&passwd, USER).map(Some).ok_or(LocalError::NoUser { user: USER })
    }

    /// Refuses a directory that this user cannot come to: PostgreSQL would say so much later, and worse.
    pub(super) fn must_reach(&self, dir: &Path) -> Result<(), LocalError> {
        for ancestor in dir.ancestors().filter(|ancestor| ancestor.is_dir()) {
            let meta = fs::metadata(ancestor).map_err(LocalError::io("look at", ancestor))?;
            let mode = meta.permissions().mode();
            let enters = match () {
                () if meta.uid() == self.uid => mode & 0o100 != 0,
                () if meta.gid() == self.gid => mode & 0o010 != 0,
                () => mode & 0o001 != 0,
            };
            if !enters {
                return Err(LocalError::OutOfReach { user: self.name.clone(), path: ancestor.to_owned() });
            }
        }
        Ok(())
    }
}

fn parse(passwd: &str, user: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields.as_slice() else { return None };
        (*name == user).then_some(())?;
        Some(Account {
            name: (*name).to_owned(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: PathBuf::from(home),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_password_file() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\npostgres:x:101:104:PostgreSQL,,,:/var/lib/postgresql:/bin/bash\n";
        let account = parse(passwd, "postgres").unwrap();
        assert_eq!((account.uid, account.gid), (101, 104));
        assert_eq!(account.home, Path::new("/var/lib/postgresql"));
        assert_eq!(parse(passwd, "post"), None);
        assert_eq!(parse("postgres:x", "postgres"), None);
    }

    #[test]
    fn a_directory_behind_a_closed_one_is_out_of_reach() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let nobody = Account { name: "x".to_owned(), uid: 4_000_001, gid: 4_000_001, home: "/".into() };
        let refused = nobody.must_reach(&inner.join("not made yet"));
        assert!(matches!(refused, Err(LocalError::OutOfReach { path, .. }) if path == dir.path()));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(nobody.must_reach(&inner).is_ok());
    }
}
