package etcd

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dchannel/dchannel"
)

func TestMapError(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	closed, end := context.WithCancelCause(t.Context())
	end(dchannel.ErrBackendClosed)
	for _, c := range []struct {
		name        string
		ctx         context.Context
		err         error
		read, write error
	}{
		{"no leader", t.Context(), rpctypes.ErrNoLeader, dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{"no leader, as gRPC says it", t.Context(), rpctypes.ErrGRPCNoLeader, dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{"overload", t.Context(), rpctypes.ErrTooManyRequests, dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{"old auth", t.Context(), rpctypes.ErrAuthOldRevision, dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{"lease", t.Context(), rpctypes.ErrLeaseNotFound, dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{"timeout", t.Context(), rpctypes.ErrTimeout, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{"leader failed", t.Context(), rpctypes.ErrTimeoutDueToLeaderFail, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{"leader changed", t.Context(), rpctypes.ErrLeaderChanged, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{"stopped", t.Context(), rpctypes.ErrStopped, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{"connection broke", t.Context(), status.Error(codes.Unavailable, "error reading from server: EOF"), dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{"password", t.Context(), rpctypes.ErrAuthFailed, dchannel.ErrRefused, dchannel.ErrRefused},
		{"permission", t.Context(), rpctypes.ErrPermissionDenied, dchannel.ErrRefused, dchannel.ErrRefused},
		{"no user", t.Context(), rpctypes.ErrUserEmpty, dchannel.ErrRefused, dchannel.ErrRefused},
		{"token", t.Context(), rpctypes.ErrInvalidAuthToken, dchannel.ErrRefused, dchannel.ErrRefused},
		{"no space", t.Context(), rpctypes.ErrNoSpace, dchannel.ErrRefused, dchannel.ErrRefused},
		{"too many ops", t.Context(), rpctypes.ErrTooManyOps, dchannel.ErrRefused, dchannel.ErrRefused},
		{"too large", t.Context(), rpctypes.ErrRequestTooLarge, dchannel.ErrTooLarge, dchannel.ErrTooLarge},
		{"too large for the client", t.Context(), status.Error(codes.ResourceExhausted, "trying to send message larger than max (3 vs. 2)"), dchannel.ErrTooLarge, dchannel.ErrTooLarge},
		{"why a watch ended", t.Context(), fmt.Errorf("the watch ended: %w", errors.New(rpctypes.ErrGRPCPermissionDenied.Error())), dchannel.ErrRefused, dchannel.ErrRefused},
		{"unknown", t.Context(), errors.New("x"), dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{"context", canceled, status.Error(codes.Canceled, "x"), nil, dchannel.ErrUncertain},
		{"closed", closed, status.Error(codes.Canceled, "x"), dchannel.ErrBackendClosed, dchannel.ErrUncertain},
	} {
		sentinels := []error{dchannel.ErrUnavailable, dchannel.ErrUncertain, dchannel.ErrRefused, dchannel.ErrTooLarge, dchannel.ErrChanClosed}
		for write, want := range map[bool]error{false: c.read, true: c.write} {
			t.Run(fmt.Sprint(c.name, " write=", write), func(t *testing.T) {
				got := mapError(c.ctx, c.err, write)
				if c.ctx == canceled {
					require.ErrorIs(t, got, context.Canceled)
				}
				if want != nil {
					require.ErrorIs(t, got, want)
				}
				for _, s := range sentinels {
					if !errors.Is(s, want) {
						require.NotErrorIs(t, got, s)
					}
				}
			})
		}
	}
	require.NoError(t, mapError(canceled, nil, true))
}

func TestCoarse(t *testing.T) {
	for seconds := 1; seconds < 100_000; seconds += 7 {
		d := time.Duration(seconds)*time.Second - time.Millisecond
		got := coarse(d)
		require.GreaterOrEqual(t, got, d)
		require.LessOrEqual(t, got, d+max(d/8, time.Second))
		require.Zero(t, got%time.Second)
	}
}
