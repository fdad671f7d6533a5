package nats

import (
	"context"
	"errors"
	"fmt"
	"testing"

	natsgo "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
)

func TestMapError(t *testing.T) {
	api := func(code, errCode int) error { return &apiError{Code: code, ErrCode: errCode, Description: "x"} }
	for _, c := range []struct {
		err        error
		read, sent error
	}{
		{natsgo.ErrNoResponders, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{errNotConnected, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{errCut, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{errNoAnswer, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{natsgo.ErrReconnectBufExceeded, dchannel.ErrUnavailable, dchannel.ErrUncertain},
		{context.Canceled, nil, dchannel.ErrUncertain},
		{context.DeadlineExceeded, nil, dchannel.ErrUncertain},
		{natsgo.ErrConnectionClosed, dchannel.ErrBackendClosed, dchannel.ErrUncertain},
		{natsgo.ErrConnectionDraining, dchannel.ErrBackendClosed, dchannel.ErrUncertain},
		{natsgo.ErrMaxPayload, dchannel.ErrTooLarge, dchannel.ErrTooLarge},
		{fmt.Errorf("x: %w", natsgo.ErrPermissionViolation), dchannel.ErrRefused, dchannel.ErrRefused},
		{natsgo.ErrAuthorization, dchannel.ErrRefused, dchannel.ErrRefused},
		{api(400, codeMessageTooLarge), dchannel.ErrTooLarge, dchannel.ErrTooLarge},
		{api(404, codeStreamNotFound), dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{api(400, codeWrongLastSeq), dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{api(400, codeWrongLastSeqR), dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{api(503, codeNoJetStream), dchannel.ErrRefused, dchannel.ErrRefused},
		{api(503, codeStoreFailed), dchannel.ErrRefused, dchannel.ErrRefused},
		{api(503, codeInsufficient), dchannel.ErrRefused, dchannel.ErrRefused},
		{api(503, 10008), dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{api(429, 10167), dchannel.ErrUnavailable, dchannel.ErrUnavailable},
		{api(400, 10166), dchannel.ErrRefused, dchannel.ErrRefused},
		{fmt.Errorf("%w: x", dchannel.ErrChanClosed), dchannel.ErrChanClosed, dchannel.ErrChanClosed},
		{errClosed, dchannel.ErrBackendClosed, dchannel.ErrBackendClosed},
	} {
		for maybe, want := range map[bool]error{false: c.read, true: c.sent} {
			got := mapError(c.err, maybe)
			require.ErrorIs(t, got, c.err)
			require.Equal(t, want, sentinel(got), "%v, maybe %v", c.err, maybe)
		}
	}
	require.NoError(t, mapError(nil, true))
	require.True(t, conflict(mapError(api(400, codeWrongLastSeqR), false)))
	require.False(t, conflict(errors.New("x")))
}

func TestTokensAreOneToOne(t *testing.T) {
	seen := map[string]string{}
	for _, name := range []string{"a", "A", "a.b", "a%2Eb", "a%2eb", "a b", "*", ">", "日本語", "%", "%%"} {
		tok := token(name)
		require.NotContains(t, tok, ".")
		require.Empty(t, seen[tok])
		seen[tok] = name
	}
	require.Equal(t, "a%2Eb-c_D9", token("a.b-c_D9"))
}
