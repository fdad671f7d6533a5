package port_test

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel/internal/testserver/port"
)

func TestReserveGivesDistinctUsablePorts(t *testing.T) {
	seen := map[int]bool{}
	for range 50 {
		p, err := port.Reserve()
		require.NoError(t, err)
		t.Cleanup(p.Release)
		require.False(t, seen[p.Number()], "port %d given out twice", p.Number())
		seen[p.Number()] = true

		l, err := net.Listen("tcp", p.Addr())
		require.NoError(t, err)
		require.NoError(t, l.Close())
	}
}

const holdEnv = "DCHANNEL_TEST_HOLD_PORTS"

// TestReservationsExcludeOtherProcesses has a second process reserve many ports and
// then looks for a collision with as many of its own.
func TestReservationsExcludeOtherProcesses(t *testing.T) {
	const n = 1000
	if os.Getenv(holdEnv) != "" {
		hold(n)
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestReservationsExcludeOtherProcesses$")
	cmd.Env = append(os.Environ(), holdEnv+"=1")
	stdin, err := cmd.StdinPipe() // the other process holds its ports until this closes
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())

	theirs := map[int]bool{}
	lines := bufio.NewScanner(stdout)
	for len(theirs) < n && lines.Scan() {
		p, err := strconv.Atoi(lines.Text())
		require.NoError(t, err)
		theirs[p] = true
	}
	assert.Len(t, theirs, n)
	for range n {
		p, err := port.Reserve()
		require.NoError(t, err)
		t.Cleanup(p.Release)
		assert.False(t, theirs[p.Number()], "port %d is reserved twice", p.Number())
	}
	require.NoError(t, stdin.Close())
	require.NoError(t, cmd.Wait())
}

func hold(n int) {
	for range n {
		p, err := port.Reserve()
		if err != nil {
			os.Exit(1)
		}
		os.Stdout.WriteString(strconv.Itoa(p.Number()) + "\n")
	}
	_, _ = os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}
