package testserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
)

// pinnedBinary returns $env, or .bin/name at the root of the repository, which it
// builds from tools/go.mod when that is newer. `make` has the same rule for the same
// file; this is for a plain `go test`.
func pinnedBinary(ctx context.Context, env, name, pkg string) (string, error) {
	if v := os.Getenv(env); v != "" {
		path, err := exec.LookPath(v)
		if err != nil {
			return "", fmt.Errorf("%s: %w", env, err)
		}
		return path, nil
	}
	root, err := repoRoot()
	if err != nil {
		return "", fmt.Errorf("find %s: %w; set %s to the binary", name, err, env)
	}
	path := filepath.Join(root, ".bin", name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	// Test binaries of several packages run at once: the first builds, the others wait.
	unlock, err := lockFile(path + ".lock")
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	defer unlock()
	if fresh(path, filepath.Join(root, "tools", "go.mod")) {
		return path, nil
	}
	// By another name first: a binary that is running cannot be written to.
	next := path + ".next"
	cmd := exec.CommandContext(ctx, "go", "build", "-C", filepath.Join(root, "tools"), "-o", next, pkg)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	return path, os.Rename(next, path)
}

func fresh(binary, pins string) bool {
	b, err := os.Stat(binary)
	if err != nil {
		return false
	}
	p, err := os.Stat(pins)
	return err == nil && !b.ModTime().Before(p.ModTime())
}

func lockFile(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// module finds the root's go.mod among those of nested modules.
var module = regexp.MustCompile(`(?m)^module github\.com/dchannel/dchannel$`)

func repoRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && module.MatchString(strings.ReplaceAll(string(b), "\r\n", "\n")) {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("not inside the dchannel repository")
		}
		dir = up
	}
}
