package redis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
)

type answer string

func (a answer) Error() string { return string(a) }
func (answer) RedisError()     {}

func TestMapError(t *testing.T) {
	dial := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	dialTimeout := &net.OpError{Op: "dial", Net: "tcp", Err: context.DeadlineExceeded}
	reset := &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
	timeout := &net.OpError{Op: "read", Net: "tcp", Err: os.ErrDeadlineExceeded}
	sentinels := []error{dchannel.ErrUnavailable, dchannel.ErrUncertain, dchannel.ErrRefused, dchannel.ErrTooLarge, dchannel.ErrBackendClosed}
	for _, c := range []struct {
		cause   error
		written bool
		want    error // of the sentinels; nil for none
	}{
		{dial, false, dchannel.ErrUnavailable},
		{dialTimeout, false, dchannel.ErrUnavailable},
		{fmt.Errorf("dial: %w", dial), false, dchannel.ErrUnavailable},
		{reset, false, dchannel.ErrUnavailable},
		{reset, true, dchannel.ErrUncertain},
		{timeout, false, dchannel.ErrUnavailable},
		{timeout, true, dchannel.ErrUncertain},
		{io.EOF, false, dchannel.ErrUnavailable},
		{io.EOF, true, dchannel.ErrUncertain},
		{goredis.ErrPoolTimeout, false, dchannel.ErrUnavailable},
		{goredis.ErrClosed, false, dchannel.ErrUnavailable},
		{context.Canceled, false, nil},
		{context.DeadlineExceeded, false, nil},
		{context.Canceled, true, dchannel.ErrUncertain},
		{context.DeadlineExceeded, true, dchannel.ErrUncertain},
		{dchannel.ErrBackendClosed, false, dchannel.ErrBackendClosed},
		{answer("WRONGPASS invalid username-password pair or user is disabled."), true, dchannel.ErrRefused},
		{answer("NOAUTH Authentication required."), true, dchannel.ErrRefused},
		{answer("NOPERM this user has no permissions to run the 'evalsha' command"), true, dchannel.ErrRefused},
		{answer("READONLY You can't write against a read only replica."), true, dchannel.ErrRefused},
		{answer("OOM command not allowed when used memory > 'maxmemory'."), true, dchannel.ErrRefused},
		{answer("MISCONF Redis is configured to save RDB snapshots"), true, dchannel.ErrRefused},
		{answer("WRONGTYPE Operation against a key holding the wrong kind of value"), false, dchannel.ErrRefused},
		{answer("DCHANNEL the head of this channel is not ours"), true, dchannel.ErrRefused},
		{answer("LOADING Redis is loading the dataset in memory"), true, dchannel.ErrUnavailable},
		{answer("MASTERDOWN Link with MASTER is down"), false, dchannel.ErrUnavailable},
		{answer("CLUSTERDOWN The cluster is down"), true, dchannel.ErrUnavailable},
		{answer("TRYAGAIN Multiple keys request during rehashing of slot"), true, dchannel.ErrUnavailable},
		{answer("NOREPLICAS Not enough good replicas to write."), true, dchannel.ErrUnavailable},
		{answer("BUSY Redis is busy running a script."), true, dchannel.ErrUnavailable},
		{answer("ERR max number of clients reached"), true, dchannel.ErrUnavailable},
		{answer("ERR Protocol error: invalid bulk length"), true, dchannel.ErrTooLarge},
	} {
		err := mapError(c.cause, c.written)
		require.ErrorIs(t, err, c.cause)
		for _, s := range sentinels {
			if errors.Is(c.want, s) {
				require.ErrorIs(t, err, s, "%v, written %v", c.cause, c.written)
			} else {
				require.NotErrorIs(t, err, s, "%v, written %v", c.cause, c.written)
			}
		}
	}
	require.NoError(t, mapError(nil, true))

	for _, c := range []struct{ in, want error }{
		{mapError(io.EOF, true), dchannel.ErrUnavailable},
		{mapError(context.Canceled, true), context.Canceled},
		{mapError(context.DeadlineExceeded, true), context.DeadlineExceeded},
		{mapError(dchannel.ErrBackendClosed, true), dchannel.ErrBackendClosed},
		{mapError(answer("NOAUTH"), true), dchannel.ErrRefused},
	} {
		require.ErrorIs(t, harmless(c.in), c.want)
		require.NotErrorIs(t, harmless(c.in), dchannel.ErrUncertain)
	}
}

func TestHalves(t *testing.T) {
	c := &conn{halves: map[string]half{}}
	header := "D1 1 1 1 00000000000000000000000000000000 00000000000000000000000000000000 0 m\n"
	for _, step := range []struct {
		key, payload string
		whole, bad   bool
		data         string
	}{
		{"a", "S5 " + header, false, false, ""},
		{"b", header + "xyz", true, false, "xyz"},
		{"a", "hello", true, false, "hello"},
		{"a", "S5 " + header, false, false, ""},
		{"a", "hell", false, true, ""},
		{"a", header, true, false, ""},
		{"a", "S", false, true, ""},
		{"a", "S-1 " + header, false, false, ""},
		{"a", header, false, true, ""},
		{"a", "S1 junk", false, true, ""},
	} {
		e, whole, err := c.parse(step.key, step.payload)
		require.Equal(t, step.bad, err != nil, "%q: %v", step.payload, err)
		if err == nil {
			require.Equal(t, step.whole, whole)
			if whole {
				require.Equal(t, step.data, string(e.Data))
			}
		}
	}
	require.Empty(t, c.halves)
}

func TestParseStreamEntryNeverCrashes(t *testing.T) {
	header := "D1 1 1 1 00000000000000000000000000000000 00000000000000000000000000000000 0 m\n"
	_, _, err := parseStreamEntry([]any{"1-1", []any{"h", header, "d", "x"}})
	require.NoError(t, err)
	for _, raw := range []any{nil, "x", []any{}, []any{1, 2}, []any{"1-1", nil}, []any{"1-1", []any{"h"}},
		[]any{"1-1", []any{"h", 5, "d", 6}}, []any{"1-1", []any{"h", "", "d", ""}}, []any{"1-1", []any{"h", header}},
		[]any{"1-2", []any{"h", header, "d", "x"}}} {
		_, _, err := parseStreamEntry(raw)
		require.Error(t, err, "%v", raw)
	}
}
