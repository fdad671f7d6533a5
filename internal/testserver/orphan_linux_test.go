package testserver_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel/internal/testserver"
)

const orphanEnv = "DCHANNEL_TEST_ORPHAN"

// TestServersDieWithTheirParent kills a process that runs a frozen and a busy server.
func TestServersDieWithTheirParent(t *testing.T) {
	if os.Getenv(orphanEnv) != "" {
		for _, paused := range []bool{false, true} {
			s := testserver.RedisForTest(t, testserver.RedisConfig{})
			if paused {
				require.NoError(t, s.Pause())
			}
			fmt.Println("PID", s.PID())
		}
		_, _ = os.Stdin.Read(make([]byte, 1)) // until killed
		return
	}
	t.Parallel()
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestServersDieWithTheirParent$")
	cmd.Env = append(os.Environ(), orphanEnv+"=1", "TMPDIR="+t.TempDir())
	_, err = cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())

	var pids []int
	for lines := bufio.NewScanner(out); len(pids) < 2 && lines.Scan(); {
		var pid int
		if _, err := fmt.Sscanf(lines.Text(), "PID %d", &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	require.Len(t, pids, 2)
	require.NoError(t, cmd.Process.Kill())
	assert.Error(t, cmd.Wait())
	for _, pid := range pids {
		require.Eventually(t, func() bool { return dead(pid) }, 10*time.Second, 5*time.Millisecond)
	}
}

// dead says whether the process runs no more. Whoever inherits it may take its time
// to collect it: a zombie is dead.
func dead(pid int) bool {
	if syscall.Kill(pid, 0) != nil {
		return true
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}
